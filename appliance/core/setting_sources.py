"""Settings from their sources: command-line flag, environment, TOML file, default, the strongest first.

Which settings there are is said by a frozen dataclass whose fields are made with `setting`; the box and the hub have
one each. An unknown name or a bad value anywhere is an error that names it, never ignored, not even where a stronger
source overrides it. A relative path is relative to the working folder, in a TOML file to the file's folder; `~` is the
user's home.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from appliance.core.errors import SettingsError
from appliance.core.setting_values import BadValueError, convert

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    SettingsT = TypeVar("SettingsT", bound=DataclassInstance)
else:
    SettingsT = TypeVar("SettingsT")

_FLAG_NAMES = {"data_dir": "data"}
"""Flags that are not called after their setting."""

_LARGEST_FILE_BYTES = 1024 * 1024


def setting(default: Any, meaning: str) -> Any:
    """Declare a setting: a field of a dataclass with its default and what it is for."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """One setting as it stands, for `appliance config`."""

    name: str
    value: Any
    origin: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Sources:
    """Where values come from, strongest first.

    Attributes:
        flags: Values from the command line; None values count as not given.
        environment: The process environment; only names with the program's prefix are looked at.
        config_file: A TOML file with settings at its top level.
    """

    flags: Mapping[str, Any]
    environment: Mapping[str, str]
    config_file: Path | None


def fields_of(kind: type[Any]) -> dict[str, Field[Any]]:
    """Return every setting's dataclass field by name."""
    return {each.name: each for each in fields(kind)}


def load(
    defaults: SettingsT,
    sources: Sources,
    prefix: str,
    *,
    other_variables: Callable[[str], bool],
    where_listed: str = "`appliance config` lists them all.",
) -> tuple[SettingsT, list[EffectiveSetting]]:
    """Merge the sources and check every value by itself.

    Args:
        defaults: The settings that hold where no source gives a value; `data_dir` is one of them.
        sources: Where values come from.
        prefix: Of the environment's variables; the rest is the setting's name in capitals.
        other_variables: Tells whether a variable with the prefix is no setting.
        where_listed: Advice for whoever gives an unknown name.

    Returns:
        The settings, and each value with its origin in the order of declaration.

    Raises:
        SettingsError: An unknown name, a value of the wrong type or out of range, or an unreadable file.
    """
    kind = type(defaults)
    known, annotations = fields_of(kind), types_of(kind)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for each in _given(sources, prefix, other_variables):
        if each.name not in known:
            raise SettingsError(
                f"{each.origin} sets {each.name!r}, which is no setting.", advice=where_listed, param=each.name
            )
        values[each.name] = _checked(each, annotations[each.name])
        origins[each.name] = each.origin
    default_folder = known["data_dir"].default
    values.setdefault("data_dir", _checked(_Given("data_dir", str(default_folder), "the default"), Path))
    settings = replace(defaults, **values)
    effective = [
        EffectiveSetting(name, getattr(settings, name), origins.get(name, "default"), each.metadata["meaning"])
        for name, each in known.items()
    ]
    return settings, effective


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse one of the two TLS files without the other.

    Raises:
        SettingsError: It names the one that is missing.
    """
    if (certificate is None) == (key is None):
        return
    given, missing = ("tls_key", "tls_certificate") if certificate is None else ("tls_certificate", "tls_key")
    raise SettingsError(f"{given} is set but {missing} is not; TLS needs both or neither.", param=missing)


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as a source gives it."""

    name: str
    value: Any
    origin: str
    from_text: bool = True
    folder: Path = Path()


def _given(sources: Sources, prefix: str, other_variables: Callable[[str], bool]) -> Iterator[_Given]:
    """Yield what each source gives, weakest source first."""
    if sources.config_file is not None:
        folder = sources.config_file.parent
        for name, value in _read_toml(sources.config_file).items():
            yield _Given(name, value, f"file {sources.config_file}", from_text=False, folder=folder)
    for variable, text in sorted(sources.environment.items()):
        if variable.startswith(prefix) and not other_variables(variable):
            name = variable.removeprefix(prefix)
            yield _Given(name.lower() if re.fullmatch("[A-Z0-9_]+", name) else name, text, f"environment {variable}")
    for name, value in sources.flags.items():
        if value is not None:
            yield _Given(name, value, f"flag --{_FLAG_NAMES.get(name, name).replace('_', '-')}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
        if len(content) > _LARGEST_FILE_BYTES:
            raise SettingsError(
                f"The settings file {path} has more than {_LARGEST_FILE_BYTES} bytes; it cannot be one."
            )
        return tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"The settings file {path} is not valid TOML: {error}.") from error


def _checked(given: _Given, annotation: Any) -> Any:
    try:
        value = convert(given.value, annotation, from_text=given.from_text, folder=given.folder)
    except BadValueError as error:
        raise _bad(given, str(error)) from error
    if given.name == "host" and not _is_address(value):
        raise _bad(given, "it takes an IP address of this machine, such as 127.0.0.1, 0.0.0.0 or ::1, or localhost")
    return value


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _bad(given: _Given, what_fits: str) -> SettingsError:
    shown = repr(str(given.value) if isinstance(given.value, Path) else given.value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
    return SettingsError(f"{given.origin} sets {given.name} to {shown}; {what_fits}.", param=given.name)


@cache
def types_of(kind: type[Any]) -> dict[str, Any]:
    """Return every setting's annotation by name, bounds included."""
    return get_type_hints(kind, include_extras=True)
