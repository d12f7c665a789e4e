"""The events of a response's stream, in OpenAI's order, each with its number. Pure.

A stream that goes on after a restart tells what the journal has and the stream had not, and closes items that were
begun and never became part of the answer as `incomplete`; the answer comes in new items behind them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from appliance.agents.items import FILE_SEARCH, function_call, logprob_of, message, output_text
from appliance.agents.loop import Call
from appliance.core.agents import Event
from appliance.core.sessions import Item
from appliance.core.types import TokenLogprob

TERMINAL = {
    "completed": "response.completed",
    "failed": "response.failed",
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",
}
"""The last event by the status that a response ends with; OpenAI has none of its own for a cancelled one."""


class Narrator:
    """Tells one response. What each method returns is to be shown in that order."""

    def __init__(self, told: Sequence[Event] = ()) -> None:
        """Go on behind what was told before the process ended."""
        self._number = told[-1]["sequence_number"] + 1 if told else 0
        self._places: dict[str, int] = {}
        self._told: set[tuple[str, str]] = set()
        self._open: dict[str, Item] = {}
        for event in told:
            self._remember(event)

    @property
    def next_number(self) -> int:
        """The number of the next event."""
        return self._number

    def lifecycle(self, kind: str, body: Mapping[str, Any]) -> Event:
        """Tell of the response as a whole: `response.created`, and so on."""
        return self._event(kind, response=dict(body))

    def failure(self, code: str, text: str) -> Event:
        """Tell of what no response object can tell."""
        return self._event("error", code=code, message=text, param=None)

    def begin(self, item: Item) -> list[Event]:
        """Tell that an item has begun; a message with its one part."""
        if item["id"] in self._places:
            return []
        self._places[item["id"]] = len(self._places)
        events = [self._of(item["id"], "response.output_item.added", item=_empty(item))]
        if item["type"] == "message":
            events.append(self._part(item["id"], "response.content_part.added", part=output_text("")))
        return events

    def text(self, item: str, delta: str, logprobs: Sequence[TokenLogprob] = ()) -> Event:
        """Tell what a message gained."""
        shown = [logprob_of(each) for each in logprobs]
        return self._part(item, "response.output_text.delta", delta=delta, logprobs=shown)

    def arguments(self, item: str, delta: str) -> Event:
        """Tell what the arguments of a function's call gained."""
        return self._of(item, "response.function_call_arguments.delta", delta=delta)

    def call(self, item: Item) -> list[Event]:
        """Tell that a built-in tool is asked."""
        name = item["id"]
        begun = self.begin(item)
        if not begun:
            return []
        if item["type"] == "mcp_call":
            return [
                *begun,
                self._of(name, "response.mcp_call.in_progress"),
                self._of(name, "response.mcp_call_arguments.delta", delta=item["arguments"]),
                self._of(name, "response.mcp_call_arguments.done", arguments=item["arguments"]),
            ]
        return [
            *begun,
            self._of(name, "response.file_search_call.in_progress"),
            self._of(name, "response.file_search_call.searching"),
        ]

    def close(self, item: Item) -> list[Event]:
        """Tell that an item is whole, and before it whatever of it has not been told."""
        begun = self.begin(item) if item["type"] not in ("mcp_call", "file_search_call") else self.call(item)
        name = item["id"]
        events: list[Event] = []
        match item["type"]:
            case "message":
                part = item["content"][0]
                events.append(
                    self._part(name, "response.output_text.done", text=part["text"], logprobs=part.get("logprobs", []))
                )
                events.append(self._part(name, "response.content_part.done", part=part))
            case "function_call":
                events.append(
                    self._of(
                        name, "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
                    )
                )
            case "mcp_call":
                ended = "completed" if item["status"] == "completed" else "failed"
                events.append(self._of(name, f"response.mcp_call.{ended}"))
            case "file_search_call":
                events.append(self._of(name, "response.file_search_call.completed"))
        events.append(self._of(name, "response.output_item.done", item=item))
        return begun + events

    def catch_up(self, items: Sequence[Item], waiting: Collection[str] = ()) -> list[Event]:
        """Tell what the journal has and the stream had not, and close what will never be whole.

        Args:
            items: The output so far.
            waiting: Ids of items that are still to be closed.
        """
        kept = {*waiting, *(each["id"] for each in items)}
        events: list[Event] = []
        for name, item in tuple(self._open.items()):
            if name not in kept:
                events.append(self._of(name, "response.output_item.done", item={**item, "status": "incomplete"}))
        for item in items:
            if ("response.output_item.done", item["id"]) not in self._told:
                events += self.close(item)
        return events

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        self._remember(event)
        return event

    def _of(self, place: str, kind: str, **fields: Any) -> Event:
        whole = fields if "item" in fields else {"item_id": place, **fields}
        return self._event(kind, output_index=self._places[place], **whole)

    def _part(self, item: str, kind: str, **fields: Any) -> Event:
        return self._of(item, kind, content_index=0, **fields)

    def _remember(self, event: Event) -> None:
        """Keep what of an earlier stream matters to its going on."""
        item = event.get("item")
        if item is None:
            return
        self._told.add((event["type"], item["id"]))
        if event["type"] == "response.output_item.added":
            self._places[item["id"]] = event["output_index"]
            self._open[item["id"]] = item
        else:
            self._open.pop(item["id"], None)


def terminal(body: Mapping[str, Any], number: int) -> Event:
    """Return the last event of a response that has ended."""
    return {"type": TERMINAL[body["status"]], "sequence_number": number, "response": dict(body)}


def begun_message(item: str) -> Item:
    """Return a message that nothing is in yet."""
    return message(item, [], "in_progress")


def begun_call(item: str, call_id: str, name: str) -> Item:
    """Return a call of a function whose arguments are still to come."""
    return function_call(Call(call_id, name, "", item), "in_progress")


def _empty(item: Item) -> Item:
    """Return an item as it is when it begins."""
    match item["type"]:
        case "message":
            return {**item, "status": "in_progress", "content": []}
        case "function_call":
            return {**item, "status": "in_progress", "arguments": ""}
        case "mcp_call":
            return {**item, "status": "in_progress", "arguments": "", "output": None, "error": None}
        case _ if item["type"] == f"{FILE_SEARCH}_call":
            return {key: value for key, value in item.items() if key != "call"} | {
                "status": "in_progress",
                "results": None,
            }
        case _:
            return item
