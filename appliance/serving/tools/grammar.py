"""What an answer of a model with tools must look like, as a grammar of llguidance's Lark. Pure.

Where the model may choose, its text is free until a dialect's mark, and from there on it can only be a call of a tool
that is offered, with arguments of its schema. Each schema stands as a document of its own, so that its `$ref` hold.
Syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.core.tools import Tool
from appliance.serving.schemas import MOST_SCHEMA_BYTES
from appliance.serving.tools.dialects import Dialect
from appliance.serving.tools.schemas import ONE_WAY, argument_schema


def call_grammar(
    dialect: Dialect,
    tools: Sequence[Tool],
    *,
    required: bool,
    parallel: bool,
    tokens: Mapping[str, int],
    text: Grammar | None = None,
) -> Grammar:
    """Return the grammar of an answer.

    Args:
        dialect: How the model writes calls.
        tools: Those that may be called; at least one.
        required: Whether the answer is nothing but calls.
        parallel: Whether there may be several.
        tokens: Ids of the dialect's marks that are control tokens of the vocabulary.
        text: What the answer must look like if it is no call; JSON only.

    Raises:
        InvalidRequestError: A schema cannot be held to, or the two grammars cannot stand together.
    """
    rules = [*_call_rules(dialect, tools, parallel=parallel, tokens=tokens)]
    if required:
        rules.append("start: calls")
    elif text is not None:
        rules += _answer_or_calls(dialect, text)
    elif not dialect.is_marked:
        rules += ["start: TEXT | calls", r"TEXT: /[ \t\r\n]*([^ \t\r\n{\[](.|\n)*)?/"]
    elif (mark := _first_mark(dialect)) in tokens:
        rules += ["start: TEXT | TEXT calls", r"TEXT: /(.|\n)*/"]
    else:
        rules += [
            "start: TEXT | lead rest",
            r"TEXT: /(.|\n)*/",
            f"lead[lazy]: TEXT {_quoted(mark)}",
            f"rest: {_calls(dialect, tokens, parallel=parallel, lead=mark)}",
        ]
    return Grammar("lark", "\n".join(["%llguidance {}", *rules, ""]), param="tools")


def _call_rules(dialect: Dialect, tools: Sequence[Tool], *, parallel: bool, tokens: Mapping[str, int]) -> list[str]:
    rules = [f"calls: {_calls(dialect, tokens, parallel=parallel)}"]
    names = []
    size = 0
    for index, tool in enumerate(tools):
        schema = json.dumps(argument_schema(tool.parameters), ensure_ascii=False)
        size += len(schema.encode())
        names.append(f"tool_{index}")
        rules += [
            f"tool_{index}: {_literal(tool.name + dialect.middle, tokens)} arguments_{index}",
            f"arguments_{index}: %json {schema}",
        ]
    if size > MOST_SCHEMA_BYTES:
        raise InvalidRequestError(
            f"The tools' schemas have {size} bytes together; {MOST_SCHEMA_BYTES} are allowed.",
            advice="Offer fewer tools, or shorten their schemas.",
            param="tools",
            code="invalid_grammar",
        )
    return [*rules, f"tool: ({' | '.join(names)}) {_literal(dialect.after, tokens)}"]


def _calls(dialect: Dialect, tokens: Mapping[str, int], *, parallel: bool, lead: str = "") -> str:
    """Return the rule's body for all calls; `lead` is what has been written of it already."""
    starts = [f"{each}{dialect.before}".removeprefix(lead) for each in dialect.start]
    first = " | ".join(_literal(each, tokens) for each in starts)
    more = f"({_literal(dialect.between + dialect.before, tokens)} tool)*" if parallel else ""
    return f"({first}) tool {more} {_literal(dialect.end, tokens)}"


def _first_mark(dialect: Dialect) -> str:
    whole = f"{dialect.start[0]}{dialect.before}"
    return next(each for each in dialect.marks if whole.startswith(each))


def _answer_or_calls(dialect: Dialect, text: Grammar) -> list[str]:
    """Return the rules of an answer that is JSON or calls."""
    if not dialect.is_marked:
        raise InvalidRequestError(
            "This model writes tool calls as plain JSON, which cannot be told from an answer in JSON.",
            advice="Leave out `response_format`, or set `tool_choice` to `none` or `required`.",
            param=text.param,
            code="unsupported_parameter",
        )
    if text.kind not in ("json_object", "json_schema"):
        raise InvalidRequestError(
            "An answer that may be a tool call can be held to JSON, but not to another grammar as well.",
            advice="Leave out the grammar, or set `tool_choice` to `none` or `required`.",
            param=text.param,
            code="unsupported_parameter",
        )
    schema = json.loads(text.text) if text.kind == "json_schema" else {"type": "object"}
    if isinstance(schema, dict):
        schema["x-guidance"] = ONE_WAY
    return ["start: answer | calls", f"answer: %json {json.dumps(schema, ensure_ascii=False)}"]


def _literal(text: str, tokens: Mapping[str, int]) -> str:
    """Return a text as Lark writes it: quoted, with control tokens by their id."""
    if not tokens:
        return _quoted(text)
    marks = "|".join(re.escape(each) for each in tokens)
    parts = re.split(f"({marks})", text)
    return " ".join(f"<[{tokens[each]}]>" if index % 2 else _quoted(each) for index, each in enumerate(parts) if each)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
