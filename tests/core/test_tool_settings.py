"""Settings of tools that are lists, written as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.errors import SettingsError
from appliance.core.settings import Settings
from appliance.core.tool_settings import mcp_servers, sql_databases


def test_nothing_is_registered_by_itself() -> None:
    assert sql_databases(Settings()) == {}
    assert mcp_servers(Settings()) == frozenset()


def test_lists_are_read() -> None:
    given = replace(
        Settings(), sql_databases=" sales = /srv/a.db,stock=/srv/b=c.db, ", mcp_servers="http://a/x, https://b:1"
    )
    assert sql_databases(given) == {"sales": Path("/srv/a.db"), "stock": Path("/srv/b=c.db")}
    assert mcp_servers(given) == {"http://a/x", "https://b:1"}
    assert sql_databases(replace(Settings(), sql_databases="a=~/x.db"))["a"].is_absolute()


@pytest.mark.parametrize("text", ["a", "a=", "=x", "a=relative.db", "a b=/x", "a=/x,a=/y", f"{'a' * 65}=/x", "ä=/x"])
def test_a_bad_database_is_named(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        sql_databases(replace(Settings(), sql_databases=text))
    assert caught.value.param == "sql_databases"


@pytest.mark.parametrize(
    "text", ["shop", "ftp://a", "http://", "http://a:0", "http://a:x", "http://u:p@a/", "http://a#b", "http://[a"]
)
def test_a_bad_server_is_named_without_its_password(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        mcp_servers(replace(Settings(), mcp_servers=text))
    assert caught.value.param == "mcp_servers"
    assert "u:p" not in str(caught.value)
