"""The journal of a loop as it is kept, and the output items that it amounts to. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from appliance.agents.items import UNKNOWN_LABEL, approval_request, call_item
from appliance.agents.loop import Call, Called, End, Entry, Resumed, Returned, Said
from appliance.core.agents import Turn
from appliance.core.errors import StorageError
from appliance.core.sessions import Item, Step

_TYPES: Mapping[str, type[Entry]] = {"said": Said, "called": Called, "returned": Returned, "resumed": Resumed}
_KINDS: Mapping[type[Entry], Any] = {Said: "model", Called: "call", Returned: "result", Resumed: "model"}


def step_of(number: int, entry: Entry) -> Step:
    """Return an entry as a step that is kept."""
    name = next(name for name, kind in _TYPES.items() if type(entry) is kind)
    return Step(number, _KINDS[type(entry)], {name: msgspec.to_builtins(entry)})


def entry_of(step: Step) -> Entry:
    """Return what a step says.

    Raises:
        StorageError: It is none that `step_of` makes.
    """
    try:
        ((name, data),) = step.data.items()
        return msgspec.convert(data, _TYPES[name])
    except (ValueError, KeyError, msgspec.ValidationError) as error:
        raise StorageError(f"Step {step.number} of a response's journal cannot be read.") from error


def write_turn(turn: Turn) -> dict[str, Any]:
    """Return a turn as JSON."""
    written: dict[str, Any] = msgspec.to_builtins(turn, str_keys=True)
    return written


def read_turn(written: Mapping[str, Any]) -> Turn:
    """Return a turn that was written as JSON.

    Raises:
        StorageError: It is none.
    """
    try:
        return msgspec.convert(written, Turn, str_keys=True)
    except msgspec.ValidationError as error:
        raise StorageError("The request of a response cannot be read; another version wrote it.") from error


def calls_of(journal: Sequence[Entry]) -> dict[str, Call]:
    """Return every call by its id."""
    return {call.id: call for entry in journal if isinstance(entry, Said) for call in entry.calls}


def output_of(
    journal: Sequence[Entry], labels: Mapping[str, str], functions: frozenset[str], end: End | None = None
) -> list[Item]:
    """Return the output items so far, in their order.

    Args:
        journal: What happened.
        labels: The label of each built-in tool by its name.
        functions: Names of the client's functions, whose calls are among the items of a step.
        end: How it ended, if it has: calls that wait for approval are shown as requests.
    """
    results = {entry.call: entry.result for entry in journal if isinstance(entry, Returned)}
    waiting = {call.id for call in end.calls} if end is not None else set()
    return list(_output(journal, labels, functions, results, waiting))


def _output(
    journal: Sequence[Entry],
    labels: Mapping[str, str],
    functions: frozenset[str],
    results: Mapping[str, Any],
    waiting: set[str],
) -> Iterator[Item]:
    for entry in journal:
        if not isinstance(entry, Said):
            continue
        yield from entry.items
        for call in entry.calls:
            label = labels.get(call.name, UNKNOWN_LABEL)
            if call.name in functions:
                continue
            if call.id in waiting:
                yield approval_request(call, label)
            elif call.id in results:
                yield call_item(call, label, results[call.id])
