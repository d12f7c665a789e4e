"""Settings of built-in tools that are lists, written as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from appliance.core.errors import SettingsError
from appliance.core.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def sql_databases(settings: Settings) -> Mapping[str, Path]:
    """Return the files that `sql_databases` registers, by name.

    Raises:
        SettingsError: One has no fit name, or no absolute path, or two have one name.
    """
    files: dict[str, Path] = {}
    for entry in filter(None, map(str.strip, settings.sql_databases.split(","))):
        name, _, path = (part.strip() for part in entry.partition("="))
        if not _NAME.fullmatch(name) or name in files:
            raise _bad("sql_databases", entry, "each entry has a name of its own, of letters, digits, `_` and `-`")
        file = Path(path).expanduser() if path else Path()
        if not file.is_absolute():
            raise _bad("sql_databases", entry, "each entry is a name, `=` and an absolute path")
        files[name] = file
    return files


def mcp_servers(settings: Settings) -> frozenset[str]:
    """Return the URLs that `mcp_servers` allows.

    Raises:
        SettingsError: One is no URL of a server.
    """
    urls = frozenset(settings.mcp_servers.replace(",", " ").split())
    for url in urls:
        try:
            parts = urlsplit(url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fits = False
        if not fits or "@" in parts.netloc or parts.fragment:
            raise _bad("mcp_servers", url, "it takes http and https URLs without user, password and fragment")
    return urls


def _bad(setting: str, given: str, what_fits: str) -> SettingsError:
    shown = given if "@" not in given else "a URL with a user"
    return SettingsError(f"{setting} has the entry {shown[:100]!r}; {what_fits}.", param=setting)
