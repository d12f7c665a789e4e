"""Lists in pages, as OpenAI has them: `limit`, `order`, and `after`, the id that the page before ended with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from appliance.web.query import query_of
from appliance.web.wire import Text, meaning, refused

__all__ = ["HasId", "Id", "PageQuery", "ends", "query_of"]

Id = Annotated[Text, Meta(max_length=64)]


class PageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which page of a list."""

    limit: Annotated[Annotated[int, Meta(ge=1, le=100)], meaning("Most entries of the page")] = 20
    order: Annotated[Literal["asc", "desc"], meaning("By the time of creation")] = "desc"
    after: Annotated[Id, meaning("Id of the last entry of the page before")] = ""
    before: Annotated[Literal[""], refused("lists are read forwards; turn `order` round.")] = ""


class HasId(Protocol):
    """An entry of a list."""

    @property
    def id(self) -> str:
        """Return what `after` takes."""
        ...


def ends(entries: Sequence[HasId]) -> tuple[str | None, str | None]:
    """Return the first and the last id of a page."""
    return (entries[0].id, entries[-1].id) if entries else (None, None)
