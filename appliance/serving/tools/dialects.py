"""How families of models write tool calls, and which of them a chat template means.

Every dialect here wraps JSON: marks around a call or around all of them, the name, and the arguments as an object.
Where a template speaks of tools in another form, or of none, the appliance describes the tools itself, in Hermes' form,
which most models have seen; Gemma, which knows none, gets the form of Google's guide. Pure.

Sources: the chat templates of Qwen 2.5 and 3, Hermes 2 and 3, Llama 3.1 to 3.3, Mistral 7B v0.3 to Small 3.2 and
Phi 4 mini; https://ai.google.dev/gemma/docs/capabilities/function-calling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to write calls: `start`, then the calls with `between` them, then `end`.

    A call is `before` name `middle` arguments `after`. A mark may be a control token of the vocabulary.

    Attributes:
        marks: Texts in it that may be control tokens.
        start: What stands before the first call; the alternatives that there are, the usual one first.
        id_length: Letters and digits of a call's id as the template wants them, or 0 for any.
        one_call: Whether the template refuses messages of several calls.
    """

    name: str
    marks: tuple[str, ...]
    start: tuple[str, ...]
    before: str
    middle: str
    after: str
    between: str
    end: str
    id_length: int = 0
    one_call: bool = False

    @property
    def is_marked(self) -> bool:
        """Return whether calls may follow text: without a mark they are told from text by being the whole answer."""
        return all(any(f"{each}{self.before}".startswith(mark) for mark in self.marks) for each in self.start)

    def call(self, name: str, arguments: str) -> str:
        """Return one call, without what stands around all of them."""
        return f"{self.before}{name}{self.middle}{arguments}{self.after}"


HERMES = Dialect(
    name="hermes",
    marks=("<tool_call>", "</tool_call>"),
    start=("",),
    before='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    after="}\n</tool_call>",
    between="\n",
    end="",
)
LLAMA_3 = Dialect(
    name="llama3",
    marks=("<|python_tag|>",),
    start=("", "<|python_tag|>"),
    before='{"name": "',
    middle='", "parameters": ',
    after="}",
    between="; ",
    end="",
    one_call=True,
)
MISTRAL = Dialect(
    name="mistral",
    marks=("[TOOL_CALLS]",),
    start=("[TOOL_CALLS][", "[TOOL_CALLS] ["),
    before='{"name": "',
    middle='", "arguments": ',
    after="}",
    between=", ",
    end="]",
    id_length=9,
)
MISTRAL_ARGS = Dialect(
    name="mistral-args",
    marks=("[TOOL_CALLS]", "[ARGS]"),
    start=("",),
    before="[TOOL_CALLS]",
    middle="[ARGS]",
    after="",
    between="",
    end="",
    id_length=9,
)
PHI_4 = Dialect(
    name="phi4",
    marks=("<|tool_call|>", "<|/tool_call|>"),
    start=("<|tool_call|>[",),
    before='{"name": "',
    middle='", "arguments": ',
    after="}",
    between=", ",
    end="]<|/tool_call|>",
)
GEMMA = Dialect(
    name="gemma",
    marks=(),
    start=("",),
    before='{"name": "',
    middle='", "parameters": ',
    after="}",
    between="\n",
    end="",
)
JSON_LIST = Dialect(
    name="json-list",
    marks=(),
    start=("[",),
    before='{"name": "',
    middle='", "arguments": ',
    after="}",
    between=", ",
    end="]",
)
JSON = Dialect(
    name="json",
    marks=(),
    start=("",),
    before='{"name": "',
    middle='", "arguments": ',
    after="}",
    between="\n",
    end="",
)


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How a model is told of tools.

    Attributes:
        native: Whether its own template tells it; else the appliance does, in a message.
    """

    dialect: Dialect
    native: bool


def tool_style(template: str) -> ToolStyle:
    """Return how the model with this chat template is told of tools, and how it then writes calls."""
    if not reads_tools(template):
        return ToolStyle(GEMMA if "<start_of_turn>" in template else HERMES, native=False)
    dialect = _native_dialect(template)
    return ToolStyle(HERMES, native=False) if dialect is None else ToolStyle(dialect, native=True)


def reads_tools(template: str) -> bool:
    """Return whether a template's code, not only its text, speaks of a variable `tools`."""
    return any("tools" in _identifiers(code) for code in _code(template))


def _native_dialect(template: str) -> Dialect | None:
    """Return the dialect that a template with tools teaches, or None for one that is not known here."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if "<|tool_call|>" in template and "<|/tool_call|>" in template:
        return PHI_4
    if "<|start_header_id|>" in template and "parameters" in template:
        return LLAMA_3
    return _plain_dialect(template)


def _plain_dialect(template: str) -> Dialect | None:
    """Return the dialect of bare JSON that a template asks for, by the example that it gives the model."""
    squeezed = "".join(template.split()).replace('\\"', '"')
    if '[{"name":' in squeezed and '"arguments":' in squeezed:
        return JSON_LIST
    if '{"name":' in squeezed and '"arguments":' in squeezed:
        return JSON
    return None


def _code(template: str) -> Iterator[str]:
    """Yield what stands between Jinja's braces."""
    at = 0
    while (at := template.find("{", at)) >= 0:
        closing = {"{%": "%}", "{{": "}}"}.get(template[at : at + 2])
        if closing is None:
            at += 1
            continue
        end = template.find(closing, at + 2)
        if end < 0:
            return
        yield template[at + 2 : end]
        at = end + 2


def _identifiers(code: str) -> set[str]:
    return set("".join(each if each.isalnum() or each == "_" else " " for each in _without_strings(code)).split())


def _without_strings(code: str) -> str:
    """Return code without its string literals."""
    kept, quote, skip = [], "", False
    for each in code:
        if skip:
            skip = False
        elif quote:
            skip = each == "\\"
            quote = "" if each == quote else quote
        elif each in "'\"":
            quote = each
        else:
            kept.append(each)
    return "".join(kept)
