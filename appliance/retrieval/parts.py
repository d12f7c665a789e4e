"""What taking files in needs of the other parts of this room, as each of them offers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from appliance.core.retrieval import Chunking, SearchRequest, SearchResult


class Block(Protocol):
    """A piece of a document: a heading of a level from 1, or anything else of level 0."""

    @property
    def kind(self) -> Literal["heading", "paragraph", "list", "table", "code"]: ...
    @property
    def text(self) -> str: ...
    @property
    def page(self) -> int | None: ...
    @property
    def level(self) -> int: ...
