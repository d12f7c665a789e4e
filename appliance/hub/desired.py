"""What a device should be: documents of operators, checked, and put together for one device. Pure.

A device's desired twin is made of its groups' in the order of their names, and then its own: where two name the same
setting, the later one holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import msgspec
from msgspec import Struct

from appliance.core.errors import InvalidRequestError, TooLargeError
from appliance.core.fleet import Desired, Stream

LARGEST_DESIRED_BYTES = 46_000
"""Its envelope, which writes it in Base64, must fit into `LARGEST_DOCUMENT_BYTES`."""

LONGEST_INTERVAL_S = 86_400.0

_SETTING = re.compile(r"[a-z][a-z0-9_]{0,63}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_STREAMS = get_args(Stream)


class DesiredDocument(Struct, frozen=True, forbid_unknown_fields=True):
    """What operators write of a device or of a group; fields as in `core.fleet.Desired`.

    Attributes:
        settings: Values by name; the device refuses by name what it does not know.
        telemetry: Seconds between rows by stream; 0 is off.
        models: The version that each model's name should mean.
    """

    settings: dict[str, Any] = {}
    telemetry: dict[str, float] = {}
    models: dict[str, str] = {}


def check_document(document: DesiredDocument) -> None:
    """Refuse names and values that no device could take.

    Raises:
        InvalidRequestError: `param` names what is wrong.
        TooLargeError: It is too large to be sent.
    """
    for name, value in document.settings.items():
        _check_setting(name, value)
    for stream, interval_s in document.telemetry.items():
        if stream not in _STREAMS:
            raise _wrong(f"telemetry.{stream}", f"there is no stream {stream[:64]!r}; there are {', '.join(_STREAMS)}")
        if not (math.isfinite(interval_s) and 0 <= interval_s <= LONGEST_INTERVAL_S):
            raise _wrong(f"telemetry.{stream}", f"seconds are 0 to {LONGEST_INTERVAL_S:g}")
    for model, version in document.models.items():
        if not _NAME.fullmatch(model) or not _NAME.fullmatch(version):
            raise _wrong(f"models.{model}", "a model and its version are small letters, digits, `.`, `-` and `_`")
    _check_size(document)


def put_together(device: str, version: int, documents: Iterable[DesiredDocument]) -> Desired:
    """Return the desired twin of a device.

    Args:
        device: Its id.
        version: Of the result.
        documents: Of its groups in order, then its own.
    """
    settings: dict[str, Any] = {}
    telemetry: dict[str, float] = {}
    models: dict[str, str] = {}
    for each in documents:
        settings.update(each.settings)
        telemetry.update(each.telemetry)
        models.update(each.models)
    return Desired(device, version, settings, telemetry, models)


def check_result(desired: Desired) -> None:
    """Refuse a desired twin whose parts are each small enough but together are not.

    Raises:
        TooLargeError: It names the device.
    """
    size = len(msgspec.json.encode(desired))
    if size > LARGEST_DESIRED_BYTES:
        raise TooLargeError(
            f"What {desired.device} should be, its groups' included, has {size} bytes; "
            f"{LARGEST_DESIRED_BYTES} can be sent."
        )


def changed(document: DesiredDocument, changes: Mapping[str, Any], *, field: str) -> DesiredDocument:
    """Return a document with some values of a field set, or taken out where None."""
    values = {**getattr(document, field), **changes}
    kept = {name: value for name, value in values.items() if value is not None}
    return msgspec.structs.replace(document, **{field: kept})


def _check_setting(name: str, value: Any) -> None:
    if not _SETTING.fullmatch(name):
        raise _wrong(f"settings.{name}", "a setting's name has small letters, digits and underscores")
    if not isinstance(value, bool | int | float | str):
        raise _wrong(f"settings.{name}", "a setting is a number, a text, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(f"settings.{name}", "a number is finite")


def _check_size(document: DesiredDocument) -> None:
    size = len(msgspec.json.encode(document))
    if size > LARGEST_DESIRED_BYTES:
        raise TooLargeError(f"The document has {size} bytes; {LARGEST_DESIRED_BYTES} can be sent to a device.")


def _wrong(where: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where[:100]}: {what}.", param=where[:100], code="invalid_value")
