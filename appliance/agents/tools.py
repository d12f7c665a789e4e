"""The tools of one response: what the model may call, and by which name. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from appliance.agents.loop import Offer
from appliance.core.agents import Turn
from appliance.core.errors import InvalidRequestError
from appliance.core.tools import BuiltInTool, Tool, ToolChoice


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one response.

    Attributes:
        by_name: Built-in ones by the names that the model calls them by.
        offer: What the loop lets the model call.
        choice: As the client set it, all names resolved.
    """

    by_name: Mapping[str, BuiltInTool] = field(default_factory=dict)
    offer: Offer = field(default_factory=Offer)
    choice: ToolChoice = field(default_factory=ToolChoice)

    @property
    def labels(self) -> dict[str, str]:
        """The label of each built-in tool."""
        return {name: each.label for name, each in self.by_name.items()}

    @property
    def built_in(self) -> Iterable[Tool]:
        """Every built-in tool, as the model is told of it."""
        return (tool for name, each in self.by_name.items() for tool in each.tools if tool.name == name)

    def choice_for(self, choice: Literal["given", "auto", "none"]) -> ToolChoice:
        """Return what one step may choose."""
        return self.choice if choice == "given" else ToolChoice(choice, self.choice.names)


def tools_of(turn: Turn, by_name: Mapping[str, BuiltInTool]) -> Tools:
    """Return the tools of a turn, and of them those that its choice leaves to the model.

    Raises:
        InvalidRequestError: The choice names none of them.
    """
    functions = frozenset(each.name for each in turn.functions)
    choice = ToolChoice(turn.tool_choice.mode, tuple(_resolved(turn.tool_choice.names, functions, by_name)))
    offered = functions | by_name.keys()
    if choice.mode == "required" and not offered:
        raise InvalidRequestError(
            "tool_choice wants a call, but the request has no tools.",
            advice="Send `tools`, or leave tool_choice out.",
            param="tool_choice",
            code="invalid_value",
        )
    allowed = frozenset() if choice.mode == "none" else frozenset(choice.names) or offered
    offer = Offer(
        functions=functions & allowed,
        built_in=allowed & by_name.keys(),
        guarded=frozenset(name for name, tool in by_name.items() if tool.needs_approval(name)),
        most_calls=turn.max_tool_calls,
        most_tokens=turn.sampling.max_tokens,
    )
    return Tools(by_name, offer, choice)


def _resolved(names: Iterable[str], functions: frozenset[str], by_name: Mapping[str, BuiltInTool]) -> dict[str, None]:
    found: dict[str, None] = {}
    for name in names:
        labelled = [each for each, tool in by_name.items() if name == f"@{tool.label}"]
        if name not in functions and name not in by_name and not labelled:
            raise InvalidRequestError(
                f"tool_choice names {name.removeprefix('@')!r}, which is not among the tools.",
                param="tool_choice",
                code="invalid_value",
            )
        found |= dict.fromkeys(labelled or [name])
    return found
