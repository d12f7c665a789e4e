"""A parked state as `ParkedStates` sees it, and what is to be done with one (pure data)."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Write:
    """Write the state that is in RAM to a file, then call `written` or `failed`; until then its RAM is in use."""

    id: str


@dataclass(frozen=True, slots=True)
class Free:
    """Give up the state's RAM."""

    id: str


@dataclass(frozen=True, slots=True)
class Erase:
    """Delete the state's file."""

    id: str


Action = Write | Free | Erase


@dataclass(eq=False, slots=True)
class ParkedState:
    """One state. What follows `pinned` is `ParkedStates`' business, for others to read.

    Attributes:
        id: Its name, never used for another state.
        tokens: The tokens whose KV it holds, as C ints; not to be changed.
        space: Only sequences of the same space can use it: the adapter, say.
        size: Bytes in RAM, and about as many on disk.
        session: Whose text the tokens are, "" if that is nobody's to delete.
        pinned: Whether it is kept however long it is not used, and although a longer state extends it.
        last_used: The tick of its last use.
        in_ram: Whether its RAM is in use.
        in_hand: Whether it was just read from its file for somebody who waits; the caps leave it out for a moment.
        on_disk: Whether its file is complete.
        writing: Whether a `Write` has not ended yet.
        leaving: Whether its RAM is given up once it is written.
        writable: False once writing it has failed.
    """

    id: str
    tokens: array[int]
    space: Hashable
    size: int
    session: str = ""
    pinned: bool = False
    last_used: int = 0
    in_ram: bool = False
    in_hand: bool = False
    on_disk: bool = False
    writing: bool = False
    leaving: bool = False
    writable: bool = True
