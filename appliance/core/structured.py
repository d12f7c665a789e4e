"""What an answer must look like: a grammar that every token is drawn within."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_object", "json_schema", "regex", "lark", "gbnf"]
"""Any JSON object; JSON of a schema; a regular expression; a grammar in llguidance's Lark, or in llama.cpp's GBNF."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as a client or the tool calls bring it.

    Attributes:
        text: The JSON Schema as JSON, the expression or the grammar; "" for any JSON object.
        param: The request's field that it came in, for errors.
        strict: Whether a JSON Schema must keep OpenAI's rules for `strict`.
    """

    kind: GrammarKind
    text: str = ""
    param: str = "response_format"
    strict: bool = False
