"""Tools for one request: what the model is told, what holds it to them, and who reads its calls. Pure.

Only the tools that may be called are in the grammar, but all are told of: the prompt stays the same, and its prefix
shared, whichever of them a request allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from appliance.core.errors import InvalidRequestError
from appliance.core.tools import Tool
from appliance.core.types import ChatMessage, GenerationRequest, SamplingParams
from appliance.serving.tools.dialects import ToolStyle
from appliance.serving.tools.grammar import call_grammar
from appliance.serving.tools.messages import function_objects, has_calls, native_messages, plain_messages
from appliance.serving.tools.reader import CallReader


@dataclass(frozen=True, slots=True)
class ModelTools:
    """How one model is told of tools.

    Attributes:
        style: Told by its chat template.
        tokens: Ids of the dialect's marks that are control tokens of its vocabulary, which else stand for no text.
    """

    style: ToolStyle
    tokens: Mapping[str, int] = field(default_factory=dict)

    def conversation(
        self, request: GenerationRequest, messages: Sequence[ChatMessage]
    ) -> tuple[list[ChatMessage], dict[str, Any]]:
        """Return the messages, and further variables, for the model's chat template.

        Raises:
            InvalidRequestError: An earlier call has arguments that are no JSON object.
        """
        offers = offers_tools(request)
        if not offers and not has_calls(messages):
            return list(messages), {}
        if self.style.native:
            extra = {"tools": function_objects(request.tools)} if offers else {}
            return native_messages(messages, self.style.dialect), extra
        return plain_messages(messages, self.style, request.tools, request.tool_choice), {}

    def sampling(self, request: GenerationRequest) -> SamplingParams:
        """Return the sampling parameters that hold an answer to the tools that it may call.

        Raises:
            InvalidRequestError: A tool is allowed that is not offered, a schema cannot be held to, or a grammar is
                given that cannot stand beside them.
        """
        if not offers_tools(request):
            return request.sampling
        required = request.tool_choice.mode == "required"
        grammar = call_grammar(
            self.style.dialect,
            allowed_tools(request),
            required=required,
            parallel=request.parallel_tool_calls,
            tokens=self.tokens,
            text=request.sampling.grammar,
        )
        return replace(request.sampling, grammar=grammar, shown_tokens=tuple(self.tokens.values()))

    def reader(self, request: GenerationRequest, new_id: Callable[[], str]) -> CallReader:
        """Return what reads one choice's calls."""
        return CallReader(self.style.dialect, [each.name for each in allowed_tools(request)], new_id)


def offers_tools(request: GenerationRequest) -> bool:
    """Return whether the model may call anything."""
    return bool(request.tools) and request.tool_choice.mode != "none"


def allowed_tools(request: GenerationRequest) -> Sequence[Tool]:
    """Return the tools that may be called.

    Raises:
        InvalidRequestError: A name is not among the tools.
    """
    known = {each.name: each for each in request.tools}
    for name in request.tool_choice.names:
        if name not in known:
            raise InvalidRequestError(
                f"tool_choice names {name!r}, which is not among the tools: {', '.join(known)[:500]}.",
                param="tool_choice",
                code="invalid_value",
            )
    return [known[name] for name in request.tool_choice.names] or list(request.tools)
