"""The files that a batch ends with: its answers, and its errors.

A file has the batch's id in its name. A process that died between writing it and saying so left one with that name,
which is whole, since files are there whole or not at all; it is taken instead of a second.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

from appliance.batches.ledger import Ledger
from appliance.batches.lines import Line, RequestLine, failed_line, read_line
from appliance.batches.reading import lines_of
from appliance.core.batches import OUTPUT_PURPOSE, Batch, BatchStatus
from appliance.core.errors import NotFoundError
from appliance.core.retrieval import Files

_ROWS = 64

_UNANSWERED: dict[BatchStatus, tuple[str, str]] = {
    "expired": ("batch_expired", "The request was not answered before the completion window ended."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before the request was answered."),
    "failed": ("batch_failed", "The batch failed before the request was answered; its `errors` say why."),
}


class Output:
    """Writes the files of one batch."""

    def __init__(self, ledger: Ledger, files: Files, batch: Batch, outcome: BatchStatus, most_bytes: int) -> None:
        """Write for a batch what its outcome asks for; lines have up to `most_bytes`."""
        self._ledger = ledger
        self._files = files
        self._batch = batch
        self._outcome = outcome
        self._most_bytes = most_bytes

    async def write(self) -> tuple[str | None, str | None]:
        """Write both files, and return their ids; None stands for one that would be empty.

        Raises:
            TooLargeError: One is over the limit of files.
            StorageError: The disk is too full.
        """
        return await self._file("output", self._answers(completed=True)), await self._file("error", self._errors())

    async def _file(self, kind: str, content: AsyncIterator[bytes]) -> str | None:
        batch = self._batch
        name = f"{batch.id}_{kind}.jsonl"
        if (written := self._find(name)) is not None:
            return written
        first = await anext(content, None)
        if first is None:
            return None
        made = await self._files.create(
            name,
            OUTPUT_PURPOSE,
            _with_first(first, content),
            tenant=batch.tenant,
            expires_after_s=batch.output_expires_after_s,
        )
        return made.id

    def _find(self, name: str) -> str | None:
        after = ""
        while True:
            found, more = self._files.list(tenant=self._batch.tenant, purpose=OUTPUT_PURPOSE, after=after)
            for each in found:
                if each.filename == name:
                    return each.id
            if not more:
                return None
            after = found[-1].id

    async def _answers(self, *, completed: bool) -> AsyncIterator[bytes]:
        behind = 0
        while rows := self._ledger.answers(self._batch.id, completed=completed, behind=behind, limit=_ROWS):
            behind = rows[-1][0]
            yield b"".join(answer for _, answer in rows)

    async def _errors(self) -> AsyncIterator[bytes]:
        async for rows in self._answers(completed=False):
            yield rows
        counts = self._batch.counts
        if self._outcome in _UNANSWERED and counts.completed + counts.failed < counts.total:
            async for each in self._unanswered(*_UNANSWERED[self._outcome]):
                yield each

    async def _unanswered(self, code: str, message: str) -> AsyncIterator[bytes]:
        """Yield an error for each line without an answer, for as long as the input is there."""
        answered = self._ledger.answered(self._batch.id)
        try:
            async for line in lines_of(self._files, self._batch, self._most_bytes):
                if line.number not in answered:
                    yield failed_line(new_request_id(), self._custom_id(line), code, message)
        except NotFoundError:
            return  # its owner has erased it, and with it what stood in its lines

    def _custom_id(self, line: Line) -> str:
        read = read_line(line, self._batch.endpoint, self._most_bytes)
        return read.custom_id if isinstance(read, RequestLine) else ""


def new_request_id() -> str:
    """Return an id for a line of the output."""
    return f"batch_req_{secrets.token_hex(12)}"


async def _with_first(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for each in rest:
        yield each
