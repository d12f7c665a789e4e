"""Lists in pages, as OpenAI has them: `limit`, `order`, and `after`, the id that the page before ended with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request

from appliance.core.errors import InvalidRequestError
from appliance.web.wire import Text, convert_query, meaning, refused

QueryT = TypeVar("QueryT", bound=msgspec.Struct)

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


def query_of(request: Request, query_type: type[QueryT], *, repeatable: Collection[str] = ()) -> QueryT:
    """Return the parameters of a request's query string; of those that may be given twice, the last.

    Raises:
        InvalidRequestError: One is unknown, given twice, or will not do.
    """
    pairs = request.query_params.multi_items()
    values = dict(pairs)
    pairs = [each for each in pairs if each[0] not in repeatable]
    if len({name for name, _ in pairs}) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))[:200]
        raise InvalidRequestError(f"{twice!r} is given twice.", param=twice, code="invalid_value")
    return convert_query(values, query_type)


def ends(entries: Sequence[HasId]) -> tuple[str | None, str | None]:
    """Return the first and the last id of a page."""
    return (entries[0].id, entries[-1].id) if entries else (None, None)
