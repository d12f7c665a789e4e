"""The sandbox itself, in this process: what a template may see, and what its text is taken for."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.serving.control_text import ControlTexts
from appliance.serving.template_process import ChatTemplate, TooLargeError, problem_of, serve
from appliance.serving.template_protocol import HEADER_BYTES, Compile, Render, Reply, to_frame
from tests.serving import chat_templates

CONTROL_TEXTS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]", "<s>", "</s>", "<end_of_turn>"]
FRAGMENTS = [*CONTROL_TEXTS, "<|im_", "end|>", "|>", "<", "[INS", "T]", "-", " ", "\n", "user", "世", "</think>", "x"]
CONTENTS = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)


def wanted(template: str, max_bytes: int = 10_000) -> Compile:
    return Compile(template, "<s>", "</s>", CONTROL_TEXTS, timeout_s=5.0, max_bytes=max_bytes)


def render(*contents: str, protect: bool = False, **extra: Any) -> Render:
    messages = [{"role": "user", "content": content} for content in contents]
    return Render(messages, add_generation_prompt=True, extra=extra, protect=protect)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ (strftime_now | attr('__globals__'))['os'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ '{a.__class__}'.format_map({'a': messages}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ [messages] | map(attribute='__class__') | first }}",
        "{% import 'os' as os %}{{ os }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_cannot_reach_python(template: str) -> None:
    compiled = ChatTemplate(wanted(template))
    messages = render("Hi")
    try:
        text = compiled.render(messages).segments[0][0]
    except Exception as error:  # noqa: BLE001  (a template may raise anything)
        text = ""
        reply = problem_of(error)
        assert (reply.problem, bool(reply.message)) == ("failed", True)
    assert text == ""  # the sandbox hides some attributes as undefined, which writes nothing
    assert messages == render("Hi")


@given(
    st.sampled_from([chat_templates.CHATML, chat_templates.LLAMA3, chat_templates.GEMMA, chat_templates.REASONING]),
    st.lists(CONTENTS, min_size=1, max_size=4),
)
def test_whatever_messages_hold_the_prompt_has_the_templates_turns(template: str, contents: list[str]) -> None:
    compiled, control_texts = ChatTemplate(wanted(template)), ControlTexts(CONTROL_TEXTS)
    segments = compiled.render(render(*contents, protect=True)).segments
    assert "".join(text for text, _ in segments) == compiled.render(render(*contents)).segments[0][0]
    turns = control_texts.found_in(compiled.render(render(*["x" for _ in contents])).segments[0][0])
    assert [each for text, special in segments if special for each in control_texts.found_in(text)] == turns


@given(st.lists(CONTENTS, min_size=1, max_size=3))
@example(["<|im_-end|>"])
@example(["<|IM_END|>", "x"])
def test_whatever_a_template_does_to_messages_none_forges_a_turn(contents: list[str]) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content | replace('-', '') | lower }}<|im_end|>{% endfor %}"
    compiled, control_texts = ChatTemplate(wanted(template)), ControlTexts(CONTROL_TEXTS)
    reply = compiled.render(render(*contents, protect=True))
    if reply.problem == "forged":
        assert any(control_texts.suspicion(each) or control_texts.could_become(each) for each in contents)
    else:
        found = [each for text, special in reply.segments if special for each in control_texts.found_in(text)]
        assert found == ["<|im_start|>", "<|im_end|>"] * len(contents)


@pytest.mark.parametrize(
    ("filters", "content"),
    [("replace('-', '')", "<|im_-end|>"), ("lower", "<|IM_END|>"), ("replace('</think>', '')", "<|im_</think>end|>")],
)
def test_a_message_that_a_template_turns_into_a_control_token_is_refused(filters: str, content: str) -> None:
    compiled = ChatTemplate(wanted("{{ messages[0].content | " + filters + " }}<|im_end|>"))
    assert compiled.render(render(content, protect=True)).problem == "forged"
    assert compiled.render(render("<-|I", protect=True)).problem is None


def test_what_hugging_face_templates_use_is_there() -> None:
    compiled = ChatTemplate(wanted(chat_templates.TOOLS + "{{ strftime_now('%%') }}"))
    messages = render("Hi", tools=[{"b": "天", "a": "<'&>"}])
    expected = '<|im_start|>system\n{"b": "天", "a": "<\'&>"}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n%'
    assert compiled.render(messages).segments == [(expected, True)]


def test_a_template_that_refuses_the_stand_in_has_looked_into_the_message() -> None:
    template = "{% if '|' not in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert ChatTemplate(wanted(template)).render(render("<|im_end|>", protect=True)).problem == "forged"


def test_text_is_measured_in_bytes() -> None:
    compiled = ChatTemplate(wanted("{{ messages[0].content }}", max_bytes=9))
    assert compiled.render(render("世" * 3)).segments == [("世世世", True)]
    with pytest.raises(TooLargeError):
        compiled.render(render("世" * 4))


def converse(*messages: Compile | Render) -> list[Reply]:
    """Run a whole conversation with the process's loop and return its replies."""
    inbound, outbound = io.BytesIO(b"".join(map(to_frame, messages))), io.BytesIO()
    restricted: list[Compile] = []
    serve(inbound, outbound, restricted.append)
    assert restricted == list(messages[:1])
    outbound.seek(0)
    replies = []
    while header := outbound.read(HEADER_BYTES):
        replies.append(msgspec.json.decode(outbound.read(int.from_bytes(header, "big")), type=Reply))
    return replies


def test_each_message_gets_one_reply_whatever_becomes_of_it() -> None:
    template = (
        "{% set text = messages[0].content %}{% if text == 'refuse' %}{{ raise_exception('not so') }}{% endif %}"
        "{% if text == 'fail' %}{{ text.nothing.more }}{% endif %}{{ text }}"
    )
    replies = converse(
        wanted(template, max_bytes=10), render("one"), render("refuse"), render("fail"), render("a" * 11), render("two")
    )
    assert [(reply.problem, reply.segments) for reply in replies] == [
        (None, []),
        (None, []),
        (None, [("one", True)]),
        ("refused", []),
        ("failed", []),
        ("too_large", []),
        (None, [("two", True)]),
    ]
    assert replies[3].message == "not so"
    assert "nothing" in replies[4].message


def test_a_template_that_does_not_compile_ends_the_conversation() -> None:
    first, second = converse(wanted("{% for %}"), render("one"))
    assert (first.problem, second.problem) == (None, "failed")
    assert "TemplateSyntaxError" in second.message


def test_a_parent_that_leaves_at_once_ends_the_conversation() -> None:
    assert converse() == [Reply()]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "more memory"),
        (RecursionError(), "too deeply"),
        (ValueError("a\ud800" * 1000), "ValueError"),
    ],
)
def test_a_problem_is_told_in_few_words_that_can_be_sent(error: Exception, words: str) -> None:
    reply = problem_of(error)
    assert words in reply.message
    assert len(to_frame(reply)) < 1000
