"""One setting's value from outside: checked against the setting's type and bounds, or refused in plain words."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta


class BadValueError(ValueError):
    """The value does not fit; the text says what would."""


def convert(value: Any, wanted: Any, *, from_text: bool, folder: Path = Path()) -> Any:
    """Return the value as the wanted type.

    Args:
        value: From a TOML file, the environment or a flag.
        wanted: The setting's annotation, with bounds as `msgspec.Meta`.
        from_text: The source knows only text, so `"8080"` may be a number; in TOML it may not.
        folder: What a relative path is relative to.

    Raises:
        BadValueError: The value is of the wrong type or out of bounds.
    """
    if isinstance(value, Path):
        value = str(value)
    if is_path(wanted):
        return _path(value, folder, optional=wanted is not Path)
    if isinstance(value, str) and not value.isprintable():
        raise BadValueError(f"it takes {describe(wanted)}, in visible characters")
    try:
        return msgspec.convert(value, wanted, strict=not (from_text and isinstance(value, str)))
    except (msgspec.ValidationError, OverflowError) as error:
        raise BadValueError(f"it takes {describe(wanted)}") from error


def is_path(wanted: Any) -> bool:
    """Return whether the annotation is `Path` or `Path | None`."""
    return wanted is Path or Path in get_args(wanted)


def describe(wanted: Any) -> str:
    """Return the annotation in words, such as `a whole number from 0 to 65535`."""
    if get_origin(wanted) is Annotated:
        kind, bounds = get_args(wanted)
        return f"{describe(kind)} {_range(bounds)}"
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(get_args(wanted))}"
    if get_origin(wanted) in {Union, types.UnionType}:
        return "a path, or nothing"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}[wanted]


def _range(bounds: Meta) -> str:
    if bounds.gt is not None:
        return f"above {bounds.gt:g}, at most {bounds.le}"
    return f"from {bounds.ge} to {bounds.le}"


def _path(value: Any, folder: Path, *, optional: bool) -> Path | None:
    if not isinstance(value, str):
        raise BadValueError("it takes a path, written as text")
    if not value:
        if optional:
            return None
        raise BadValueError("it takes a path, and this one is empty")
    if not value.isprintable():
        raise BadValueError("it takes a path of visible characters in UTF-8")
    try:
        return (folder / Path(value).expanduser()).absolute()
    except RuntimeError as error:
        raise BadValueError("the home folder of `~` is not known; write the whole path") from error
    except FileNotFoundError as error:
        raise BadValueError("the working folder is gone; write the whole path") from error
