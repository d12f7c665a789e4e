"""Answers as models of each family write them, and what they say: the text, and the calls as (name, arguments)."""

from __future__ import annotations

from typing import NamedTuple

from appliance.serving.tools import dialects
from appliance.serving.tools.dialects import Dialect


class Sample(NamedTuple):
    dialect: Dialect
    answer: str
    text: str
    calls: tuple[tuple[str, str], ...]


PARIS = '{"location": "Paris, France", "unit": "celsius"}'
TOKYO = '{"location": "東京"}'
TRICKY = '{"location": "a \\"}</tool_call>{[\\\\", "days": [1, {"x": {}}]}'
NAMES = ("get", "get_weather", "get_time")

SAMPLES = (
    Sample(
        dialects.HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        "",
        (("get_weather", PARIS),),
    ),
    Sample(
        dialects.HERMES,
        f'I will look both up.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "get_time", "arguments": {TOKYO}}}\n</tool_call>\n',
        "I will look both up.",
        (("get_weather", PARIS), ("get_time", TOKYO)),
    ),
    Sample(
        dialects.HERMES,
        f'<tool_call>{{ "name" : "get" ,"arguments":{TRICKY}}}</tool_call> Done.\n',
        " Done.",
        (("get", TRICKY),),
    ),
    Sample(dialects.HERMES, "No tool is needed: 2 < 3.\n", "No tool is needed: 2 < 3.\n", ()),
    Sample(dialects.HERMES, "a <tool_cal", "a <tool_cal", ()),
    Sample(
        dialects.HERMES,
        'Not <tool_call> {"name": "rm", "arguments": {}} </tool_call>',
        'Not <tool_call> {"name": "rm", "arguments": {}} </tool_call>',
        (),
    ),
    Sample(
        dialects.HERMES,
        '<tool_call>\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>',
        "<tool_call>",
        (("get", "{}"),),
    ),
    Sample(dialects.HERMES, '<tool_call>\n{"name": "get_we', '<tool_call>\n{"name": "get_we', ()),
    Sample(dialects.HERMES, '<tool_call>\n{"name": "get", "arguments": {"a": [1, ', "", (("get", '{"a": [1, '),)),
    Sample(dialects.HERMES, '<tool_call>\n{"name": "get", "arguments": {}}\n</tool', "", (("get", "{}"),)),
    Sample(dialects.HERMES, '<tool_call>{"name": "get", "arguments": {}} and', " and", (("get", "{}"),)),
    Sample(
        dialects.LLAMA_3,
        f'{{"name": "get_weather", "parameters": {PARIS}}}',
        "",
        (("get_weather", PARIS),),
    ),
    Sample(
        dialects.LLAMA_3,
        f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}; '
        f'{{"name": "get_time", "parameters": {TOKYO}}}',
        "",
        (("get_weather", PARIS), ("get_time", TOKYO)),
    ),
    Sample(dialects.LLAMA_3, '\n\n{"name": "get", "parameters": {}}\n', "", (("get", "{}"),)),
    Sample(dialects.LLAMA_3, '{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', ()),
    Sample(dialects.LLAMA_3, 'So: {"name": "get", "parameters": {}}', 'So: {"name": "get", "parameters": {}}', ()),
    Sample(dialects.LLAMA_3, '{"answer": 4}', '{"answer": 4}', ()),
    Sample(dialects.LLAMA_3, '{"name": "get", "parameters": {}}, or not', ", or not", (("get", "{}"),)),
    Sample(dialects.LLAMA_3, "  ", "  ", ()),
    Sample(
        dialects.MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}]',
        "",
        (("get_weather", PARIS),),
    ),
    Sample(
        dialects.MISTRAL,
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "get_time", "arguments": {TOKYO}}}]',
        "",
        (("get_weather", PARIS), ("get_time", TOKYO)),
    ),
    Sample(
        dialects.MISTRAL,
        '[TOOL_CALLS][{"name": "get", "arguments": {}}, {"name": "rm", "arguments": {}}]',
        ', {"name": "rm", "arguments": {}}]',
        (("get", "{}"),),
    ),
    Sample(dialects.MISTRAL, "See [1] and [TOOLS].", "See [1] and [TOOLS].", ()),
    Sample(
        dialects.MISTRAL_ARGS,
        f"Let me see.[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]get_time[ARGS]{TOKYO}",
        "Let me see.",
        (("get_weather", PARIS), ("get_time", TOKYO)),
    ),
    Sample(
        dialects.PHI_4,
        f'<|tool_call|>[{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "get", "arguments": {{}}}}]'
        "<|/tool_call|>",
        "",
        (("get_weather", PARIS), ("get", "{}")),
    ),
    Sample(
        dialects.GEMMA,
        f'{{"name": "get_weather", "parameters": {PARIS}}}\n{{"name": "get_time", "parameters": {TOKYO}}}',
        "",
        (("get_weather", PARIS), ("get_time", TOKYO)),
    ),
    Sample(
        dialects.JSON_LIST,
        f'[{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "get_time", "arguments": {TOKYO}}}]',
        "",
        (("get_weather", PARIS), ("get_time", TOKYO)),
    ),
    Sample(dialects.JSON_LIST, "[1, 2]", "[1, 2]", ()),
    Sample(dialects.JSON, f'{{"name": "get_time", "arguments": {TOKYO}}}', "", (("get_time", TOKYO),)),
)
