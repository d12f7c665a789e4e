"""The parameters of a request's query string."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import msgspec
from starlette.requests import Request

from appliance.core.errors import InvalidRequestError
from appliance.web.wire import convert_query

QueryT = TypeVar("QueryT", bound=msgspec.Struct)


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
