"""What comes next in a response: ask the model, run calls, or end. Pure: it reads the journal and decides.

The journal holds what happened, oldest first. A call that was begun and has no result when this is asked was
interrupted, since nobody asks while calls run: whether it did its work nobody knows, so it is never made again by
itself. The model hears so, and may ask once more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from appliance.core.tools import ToolResult


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a loop may go.

    Attributes:
        steps: Times that the model is asked.
        calls: Calls of built-in tools.
        total_s: Seconds after which no further call is made.
        tool_s: Seconds of one call.
        result_bytes: Of a result, what the model is shown.
    """

    steps: int = 12
    calls: int = 16
    total_s: float = 120.0
    tool_s: float = 30.0
    result_bytes: int = 8192


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model asked for.

    Attributes:
        item: Id of the item that shows it.
        approved: Whether a person has agreed to it.
    """

    id: str
    name: str
    arguments: str
    item: str
    approved: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """What the model said in one step; or, at the beginning, the calls of a turn before that a person decided on.

    Attributes:
        items: What of it is shown whole at once: a message, and calls of the client's functions.
        complete: False where the answer was cut off by a limit on its tokens.
        tokens: How many it wrote, read, and of these found in the cache.
        by_model: False for calls of a turn before.
    """

    items: tuple[Mapping[str, Any], ...] = ()
    calls: tuple[Call, ...] = ()
    complete: bool = True
    written_tokens: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    model: str = ""
    by_model: bool = True


@dataclass(frozen=True, slots=True)
class Called:
    """A call was begun."""

    call: str


@dataclass(frozen=True, slots=True)
class Returned:
    """A call has its result, made or not."""

    call: str
    result: ToolResult


@dataclass(frozen=True, slots=True)
class Resumed:
    """The process ended, and another took the response up."""


Entry: TypeAlias = Said | Called | Returned | Resumed


@dataclass(frozen=True, slots=True)
class Offer:
    """What the model may call, and how much it may write.

    Attributes:
        functions: Names of the client's functions.
        built_in: Names of the tools that the box runs.
        guarded: Those among them that need a person's approval.
        most_calls: The client's limit, or None.
        most_tokens: Written in all steps together, or None.
    """

    functions: frozenset[str] = frozenset()
    built_in: frozenset[str] = frozenset()
    guarded: frozenset[str] = frozenset()
    most_calls: int | None = None
    most_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the model.

    Attributes:
        choice: Leave it the choice of tools as the client set it, any of them or none, or no further call.
        most_tokens: What is left of the limit, or None.
    """

    choice: Literal["given", "auto", "none"] = "given"
    most_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Run these calls, all at once."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """Give a call this result without running it."""

    call: Call
    result: ToolResult


@dataclass(frozen=True, slots=True)
class End:
    """End the response.

    Attributes:
        reason: The model answered; its answer was cut off; calls wait for the client; calls wait for approval; the
            limit of steps is reached; a call was repeated in vain.
        calls: Those that wait for approval.
        explanation: What the reader is told where the model gave no answer, or "".
    """

    reason: Literal["answered", "cut", "handed_out", "approval", "limit", "repeated"]
    calls: tuple[Call, ...] = ()
    explanation: str = ""


Action: TypeAlias = Ask | Run | Settle | End


def decide(journal: Sequence[Entry], offer: Offer, limits: Limits, elapsed_s: float) -> Action:
    """Return what comes next.

    Args:
        journal: What happened; no call is running.
        offer: What the model may call.
        limits: How far the loop may go.
        elapsed_s: Seconds that it has taken.
    """
    past = _Past.of(journal)
    if past.last is None:
        return Ask(most_tokens=offer.most_tokens)
    if not past.last.complete:
        return End("cut")
    waiting = [each for each in past.last.calls if each.id not in past.results]
    room = _most_calls(offer, limits) - len(past.begun)
    for call in waiting:
        failure = _failure(call, past, offer, room=room, late=elapsed_s >= limits.total_s)
        if failure is not None:
            return Settle(call, failure)
    return _next(past, waiting, room, offer, limits, late=elapsed_s >= limits.total_s)


def parsed_arguments(text: str) -> dict[str, Any] | None:
    """Return a call's arguments, or None if they are no JSON object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(slots=True)
class _Past:
    """The journal by what it says."""

    said: list[Said] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)
    results: dict[str, ToolResult] = field(default_factory=dict)

    @classmethod
    def of(cls, journal: Sequence[Entry]) -> _Past:
        past = cls()
        for entry in journal:
            match entry:
                case Said():
                    past.said.append(entry)
                case Called():
                    past.begun.add(entry.call)
                case Returned():
                    past.results.setdefault(entry.call, entry.result)
        return past

    @property
    def last(self) -> Said | None:
        return self.said[-1] if self.said else None

    @property
    def steps(self) -> int:
        return sum(each.by_model for each in self.said)

    @property
    def written_tokens(self) -> int:
        return sum(each.written_tokens for each in self.said)


def _most_calls(offer: Offer, limits: Limits) -> int:
    return limits.calls if offer.most_calls is None else min(offer.most_calls, limits.calls)


def _failure(call: Call, past: _Past, offer: Offer, *, room: int, late: bool) -> ToolResult | None:
    """Return why a call cannot be made, or None."""
    if call.id in past.begun:
        return ToolResult(
            "failed", "The call was interrupted: the appliance restarted while it ran, and nobody knows how far it got."
        )
    if call.name not in offer.functions | offer.built_in:
        names = ", ".join(sorted(offer.functions | offer.built_in)) or "none"
        return ToolResult("unknown_tool", f"There is no tool {call.name[:64]!r}. The tools are: {names}.")
    if call.name in offer.functions:
        return None  # the client runs it, and judges its arguments
    if parsed_arguments(call.arguments) is None:
        return ToolResult("bad_arguments", "The arguments are no JSON object.")
    if room <= 0 or late:
        spent = "the limit of calls is reached" if room <= 0 else "the time is over"
        return ToolResult("refused", f"No further call is made: {spent}. Answer with what is known.")
    return None


def _next(past: _Past, waiting: Sequence[Call], room: int, offer: Offer, limits: Limits, *, late: bool) -> Action:
    """Return what comes next where every waiting call can be made."""
    assert past.last is not None, "there is nothing to go on from"
    ours = [each for each in waiting if each.name in offer.built_in]
    free = [each for each in ours if each.approved or each.name not in offer.guarded]
    if free:
        return Run(tuple(free[:room]))
    if ours:
        return End("approval", tuple(ours))
    if waiting:
        return End("handed_out")
    if not past.last.calls:
        return End("answered")
    return _again(past, room, offer, limits, late=late)


def _again(past: _Past, room: int, offer: Offer, limits: Limits, *, late: bool) -> Action:
    """Return what comes next where every call has its result."""
    name = _repeated(past)
    if name is not None:
        return End(
            "repeated",
            explanation=f"I stopped: I asked the tool {name!r} the same thing again, and it gave the same result.",
        )
    if past.steps >= limits.steps:
        return End("limit", explanation=f"I stopped without an answer after {past.steps} steps, which is the limit.")
    left = None if offer.most_tokens is None else offer.most_tokens - past.written_tokens
    if left is not None and left <= 0:
        return End("cut")
    spent = late or (room <= 0 and bool(offer.built_in)) or past.steps == limits.steps - 1
    forced = past.steps == 0
    return Ask("none" if spent else "given" if forced else "auto", left)


def _repeated(past: _Past) -> str | None:
    """Return the name of a tool that was asked the same in two steps and answered the same."""
    seen: set[tuple[str, str, str, str]] = set()
    for step in past.said:
        new = {_signature(call, past.results[call.id]) for call in step.calls if call.id in past.results}
        if new & seen:
            return min(new & seen)[0]
        seen |= new
    return None


def _signature(call: Call, result: ToolResult) -> tuple[str, str, str, str]:
    arguments = parsed_arguments(call.arguments)
    told = call.arguments if arguments is None else json.dumps(arguments, sort_keys=True)
    return call.name, told, result.kind, result.output
