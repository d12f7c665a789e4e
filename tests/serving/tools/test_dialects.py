"""Which dialect a chat template means."""

from __future__ import annotations

import pytest

from appliance.serving.tools import dialects
from appliance.serving.tools.dialects import Dialect, reads_tools, tool_style
from tests.serving import chat_templates
from tests.serving.tools import templates

QWEN_3_CODER = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>\n<function=name>\n</function></tool_call>"
GLM = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>{name}<arg_key>{key}</arg_key></tool_call>"
GEMMA_4 = "{% for tool in tools %}{{ tool }}{% endfor %}<|tool_call>call:name{}<tool_call|>"


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        (templates.QWEN, dialects.HERMES),
        (templates.LLAMA_3, dialects.LLAMA_3),
        (templates.MISTRAL, dialects.MISTRAL),
        (templates.MISTRAL_ARGS, dialects.MISTRAL_ARGS),
        (templates.XLAM, dialects.JSON_LIST),
        (templates.PLAIN_JSON, dialects.JSON),
        ("{{ tools }}<|tool_call|>[]<|/tool_call|>", dialects.PHI_4),
    ],
)
def test_a_template_that_tells_of_tools_does_so_itself(template: str, dialect: Dialect) -> None:
    style = tool_style(template)
    assert (style.dialect, style.native) == (dialect, True)


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("", dialects.HERMES),
        (chat_templates.CHATML, dialects.HERMES),
        (chat_templates.SMOLLM2, dialects.HERMES),
        (chat_templates.LLAMA3, dialects.HERMES),
        (chat_templates.GEMMA, dialects.GEMMA),
        (templates.PHI_4, dialects.HERMES),  # it reads tools of a message, which nobody sends
        (QWEN_3_CODER, dialects.HERMES),  # other forms than JSON
        (GLM, dialects.HERMES),
        (GEMMA_4, dialects.HERMES),
    ],
)
def test_where_it_does_not_or_in_an_unknown_form_the_appliance_does(template: str, dialect: Dialect) -> None:
    style = tool_style(template)
    assert (style.dialect, style.native) == (dialect, False)


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        ("{% if tools %}", True),
        ("{{ tools | tojson }}", True),
        ("{% set tool = tools[0] %}", True),
        ("tools", False),
        ("{ tools }", False),
        ("{{ 'tools' }}", False),
        (r"{{ 'it\'s tools' ~ x }}", False),
        ("{{ my_tools }}", False),
        ("{{ tools", False),
        ("{%" * 100_000 + " tools", False),
    ],
)
def test_a_template_reads_tools_if_its_code_does(template: str, reads: bool) -> None:
    assert reads_tools(template) is reads


def test_marks_tell_calls_from_text_anywhere() -> None:
    marked = {dialects.HERMES, dialects.MISTRAL, dialects.MISTRAL_ARGS, dialects.PHI_4}
    plain = {dialects.LLAMA_3, dialects.GEMMA, dialects.JSON, dialects.JSON_LIST}
    assert all(each.is_marked for each in marked)
    assert not any(each.is_marked for each in plain)
