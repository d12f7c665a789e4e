"""What is taken from a file: its text in blocks, in reading order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BETWEEN = "\n\n"
"""What stands between two blocks in a document's text."""

BlockKind = Literal["heading", "paragraph", "list", "table", "code"]


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a document that stands by itself.

    Attributes:
        text: Never blank. A table has one line a row, the header first, and ` | ` between cells.
        page: From 1, or None where the format has none.
        level: Of a heading, 1 to 6; otherwise 0.
    """

    kind: BlockKind
    text: str
    page: int | None = None
    level: int = 0


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """The text of a file.

    Attributes:
        title: What the file calls itself, or "".
        pages_without_text: Pages, from 1, that hold no text layer: they may be scans.
    """

    blocks: tuple[Block, ...]
    title: str = ""
    pages_without_text: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Return the whole text; offsets into a document count its characters."""
        return BETWEEN.join(block.text for block in self.blocks)
