"""Where the readers of all formats put what they find: cleaned, counted, and sent on in bounded pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from appliance.retrieval.parsing.document import BETWEEN, BlockKind
from appliance.retrieval.parsing.protocol import PIECE_CHARACTERS, Piece

BETWEEN_CELLS = " | "
FEWEST_CHARACTERS = 16
"""A shorter block counts as one of so many: blocks cost memory by themselves."""
MOST_PAGES_WITHOUT_TEXT = 100_000
_LONGEST_TITLE = 300

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_MANY_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n){2,}")
_SPACES = re.compile(r"\s+")


class UnsupportedError(Exception):
    """No text can be taken from this kind of file; the message is what follows on the file's name."""


class InvalidError(Exception):
    """The file is damaged, hostile or over a limit; the message is what follows on the file's name."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


def too_long(max_characters: int) -> InvalidError:
    """Return the refusal of a text over its limit."""
    return InvalidError(
        f"has more than {max_characters} characters of text", "Split it, or raise `max_document_characters`."
    )


def clean(text: str) -> str:
    """Return a text with plain line ends and without what cannot be seen: control characters and lone surrogates."""
    return _MANY_BLANK_LINES.sub("\n\n", _UNWANTED.sub("", _LINE_ENDS.sub("\n", text))).strip()


def one_line(text: str) -> str:
    """Return a text with every run of white space made one blank."""
    return _SPACES.sub(" ", clean(text))


class BlockWriter:
    """Takes blocks in reading order.

    Attributes:
        title: What the file calls itself, or "".
        pages_without_text: Pages without a text layer.
        max_characters: Longest text.
    """

    def __init__(self, send: Callable[[list[Piece]], None], max_characters: int) -> None:
        """Send pieces with a function as they come together."""
        self._send = send
        self.max_characters = max_characters
        self.title = ""
        self.pages_without_text: list[int] = []
        self._characters = 0
        self._pieces: list[Piece] = []
        self._waiting = 0

    def add(self, kind: BlockKind, text: str, *, page: int | None = None, level: int = 0) -> None:
        """Add a block, if there is anything to be seen in it.

        Raises:
            InvalidError: The text is too long.
        """
        text = clean(text)
        if not text:
            return
        self._count(len(text))
        for start in range(0, len(text), PIECE_CHARACTERS):
            end = start + PIECE_CHARACTERS
            self._put(Piece(kind, text[start:end], page, level, more=end < len(text)))

    def heading(self, text: str, level: int, *, page: int | None = None) -> None:
        """Add a heading on one line. Raises as `add`."""
        self.add("heading", one_line(text), page=page, level=min(max(level, 1), 6))

    def table(self, rows: Iterable[Sequence[str]], *, page: int | None = None) -> None:
        """Add a table, the header first; rows without any text are left out, and so are blank cells at a row's end.

        Raises:
            InvalidError: The text is too long.
        """
        lines: list[str] = []
        characters = 0
        for row in rows:
            cells = [one_line(cell) for cell in row]
            while cells and not cells[-1]:
                cells.pop()
            if not cells:
                continue
            lines.append(BETWEEN_CELLS.join(cells))
            characters += len(lines[-1]) + 1
            if self._characters + characters > self.max_characters + 1:
                raise too_long(self.max_characters)
        self.add("table", "\n".join(lines), page=page)

    def name(self, title: str) -> None:
        """Keep the first title that is none of blanks."""
        self.title = self.title or one_line(title)[:_LONGEST_TITLE]

    def without_text(self, page: int) -> None:
        """Remember a page without text.

        Raises:
            InvalidError: There are too many.
        """
        if len(self.pages_without_text) >= MOST_PAGES_WITHOUT_TEXT:
            raise InvalidError(f"has more than {MOST_PAGES_WITHOUT_TEXT} pages without text")
        self.pages_without_text.append(page)

    @property
    def is_empty(self) -> bool:
        """Return True as long as nothing was added."""
        return self._characters == 0

    def flush(self) -> None:
        """Send what is waiting."""
        if self._pieces:
            self._send(self._pieces)
        self._pieces, self._waiting = [], 0

    def _count(self, characters: int) -> None:
        self._characters += max(characters, FEWEST_CHARACTERS) + len(BETWEEN)
        if self._characters > self.max_characters + len(BETWEEN) + FEWEST_CHARACTERS:
            raise too_long(self.max_characters)

    def _put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._waiting += max(len(piece.text), FEWEST_CHARACTERS)
        if self._waiting >= PIECE_CHARACTERS:
            self.flush()
