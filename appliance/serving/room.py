"""Memory passes between kinds of models: what one needs, another gives back if it holds idle models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol


class Sparing(Protocol):
    """Whatever keeps models in memory."""

    ask_others: Callable[[], Awaitable[bool]]
    """Asked for memory when there is nothing idle of its own; tells whether any was given back."""

    async def spare(self) -> bool:
        """Unload an idle model; return False if there is none."""
        ...


async def nothing_to_spare() -> bool:
    """Give nothing back."""
    return False


def share_memory(*kinds: Sparing) -> None:
    """Let each kind have what another can spare; the first of the others is asked first."""
    for kind in kinds:
        kind.ask_others = partial(_spared, [each for each in kinds if each is not kind])


async def _spared(kinds: Sequence[Sparing]) -> bool:
    for kind in kinds:
        if await kind.spare():
            return True
    return False
