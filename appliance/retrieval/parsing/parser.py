"""The parent's end of the process that takes text from files."""

from __future__ import annotations

from pathlib import Path

from appliance.core.settings import Settings
from appliance.retrieval.parsing.document import ParsedDocument


class DocumentParser:
    """Takes text from files, one at a time, in a child process that may be killed."""

    def __init__(self, settings: Settings) -> None:
        """Keep the limits; nothing is started yet."""
        self._settings = settings

    async def parse(self, path: Path, filename: str, media_type: str) -> ParsedDocument:
        """Return the text of a file.

        Args:
            path: Where it lies.
            filename: As its owner calls it, for messages.
            media_type: As `sniff` found it.

        Raises:
            InvalidRequestError: `unsupported_file`, no text is taken from its type; or `invalid_file`, it is damaged,
                hostile or over a limit.
            UnavailableError: The child cannot be started, or the parser is closed.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """End the child. Idempotent; waits for a file that is being parsed."""
        raise NotImplementedError
