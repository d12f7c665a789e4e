"""Tables for people; scripts take `--json`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from appliance.core.printable import printable

PIPED_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None
) -> None:
    """Write a table to standard output; a long cell is folded, and none can hide or move anything.

    Args:
        headings: One a column.
        rows: Cells as text.
        styles: Colours of cells by their text, such as `{"failure": "red"}`.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell), (styles or {}).get(cell, ""), overflow="fold") for cell in row))
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False).print(table)
