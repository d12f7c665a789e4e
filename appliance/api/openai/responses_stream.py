"""The events of a response as server-sent events: each has its type as the event's name, as OpenAI writes them.

A stream of a response in the foreground owns it: when its client leaves, the response is cancelled. One in the
background only looks on. The last event says how the response ended; nothing follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from appliance.api.openai.stream import HEADERS, KEEP_ALIVE
from appliance.core.agents import Answer, Event
from appliance.web.disconnect import until_disconnected


class EventStream:
    """An ASGI response that writes events while they come."""

    def __init__(self, answer: Answer, *, after: int, owned: bool, keep_alive_s: float) -> None:
        """Describe the stream.

        Args:
            answer: What to write.
            after: Begin behind this number.
            owned: Whether the response ends with its stream.
            keep_alive_s: Silence after which a comment line is written.
        """
        self._answer = answer
        self._after = after
        self._owned = owned
        self._keep_alive_s = keep_alive_s

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Write the stream to its end.

        Raises:
            ClientGoneError: The client left.
        """
        try:
            await until_disconnected(receive, self._write(send))
        finally:
            if self._owned:
                self._answer.cancel()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async for events in self._answer.events(self._after, silence_s=self._keep_alive_s):
            body = _encoded(events) or KEEP_ALIVE
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _encoded(events: Sequence[Event]) -> bytes:
    return b"".join(
        b"event: " + each["type"].encode() + b"\ndata: " + msgspec.json.encode(each) + b"\n\n" for each in events
    )
