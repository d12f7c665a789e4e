"""What an answer must look like, on the wire: OpenAI's `response_format`, and vLLM's `structured_outputs` beside it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.web.wire import Text, ignored, meaning

Expression = Annotated[Text, Meta(min_length=1)]
FormatName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_\-]+$")]

_GBNF_RULE = re.compile(r"^\s*[A-Za-z0-9_\-]+\s*::=", re.MULTILINE)


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """What every format has: its name."""


class TextFormat(ResponseFormat, frozen=True, tag="text"):
    """Any text."""


class JsonObjectFormat(ResponseFormat, frozen=True, tag="json_object"):
    """A JSON object of any form."""


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON Schema, draft 4 to 2020-12. Features that are not supported are refused by name."""

    name: Annotated[FormatName, ignored("it is for the caller")]
    description: Annotated[Text | None, ignored("tell the model in a message")] = None
    schema: Annotated[dict[str, Any] | None, meaning("Any JSON unless given")] = None
    strict: Annotated[
        bool | None,
        meaning("Refuse schemas that break OpenAI's rules for it; the answer satisfies the schema in either case"),
    ] = None


class JsonSchemaFormat(ResponseFormat, frozen=True, tag="json_schema"):
    """JSON that satisfies a schema."""

    json_schema: JsonSchema


AnswerFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the answer must look like; exactly one of these."""

    json: Annotated[dict[str, Any] | UnsetType, meaning("A JSON Schema")] = UNSET
    json_object: Annotated[Literal[True] | UnsetType, meaning("A JSON object of any form")] = UNSET
    regex: Annotated[Expression | UnsetType, meaning("A regular expression that matches all of the answer")] = UNSET
    choice: Annotated[
        Annotated[list[Expression], Meta(min_length=1)] | UnsetType, meaning("Texts, of which the answer is one")
    ] = UNSET
    grammar: Annotated[
        Expression | UnsetType, meaning("A grammar in llguidance's Lark; or in GBNF, which is known by `::=`")
    ] = UNSET


def format_grammar(given: AnswerFormat | None, param: str = "response_format") -> Grammar | None:
    """Return what OpenAI's format asks for, or None for any text."""
    match given:
        case JsonObjectFormat():
            return Grammar("json_object", param=param)
        case JsonSchemaFormat(json_schema):
            text = msgspec.json.encode(json_schema.schema or {}).decode()
            return Grammar("json_schema", text, f"{param}.json_schema.schema", strict=bool(json_schema.strict))
    return None


def extension_grammar(given: StructuredOutputs | None) -> Grammar | None:
    """Return what the extension asks for, or None where it is not given.

    Raises:
        InvalidRequestError: It asks for nothing, or for two things.
    """
    if given is None:
        return None
    names = [name for name in given.__struct_fields__ if getattr(given, name) is not UNSET]
    if len(names) != 1:
        raise InvalidRequestError(
            f"structured_outputs has {' and '.join(names) or 'nothing'}; it must have exactly one field.",
            advice=f"The fields are {', '.join(given.__struct_fields__)}.",
            param="structured_outputs",
            code="invalid_value",
        )
    param = f"structured_outputs.{names[0]}"
    if isinstance(given.regex, str):
        return Grammar("regex", given.regex, param)
    if isinstance(given.grammar, str):
        return Grammar("gbnf" if _GBNF_RULE.search(given.grammar) else "lark", given.grammar, param)
    if isinstance(given.choice, list):
        return Grammar("regex", "|".join(map(re.escape, given.choice)), param)
    if isinstance(given.json, dict):
        return Grammar("json_schema", msgspec.json.encode(given.json).decode(), param)
    return Grammar("json_object", param=param)
