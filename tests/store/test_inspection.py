from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from appliance.store.database import Database
from appliance.store.inspection import OLDEST_SQLITE, inspect, sqlite_version
from appliance.store.migrations import MIGRATIONS


def test_a_sound_database_is_reported_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "appliance.db"
    insert = "INSERT INTO audit (at, actor, action, subject, detail) VALUES (0, '', '', '', '')"
    with closing(Database(path)) as database:
        database.write_blocking(lambda connection: connection.execute(insert).rowcount)
    with closing(Database(path, read_only=True)) as view:
        report = inspect(view)
    assert report.size == path.stat().st_size
    assert report.schema_version == report.newest_schema_version == len(MIGRATIONS)
    assert report.rows["audit"] == 1
    assert report.rows["api_keys"] == 0
    assert report.rows["schema_migrations"] == len(MIGRATIONS)
    assert report.damage == ()


def test_damage_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "appliance.db"
    insert = "INSERT INTO audit (at, actor, action, subject, detail) VALUES (0, '', '', ?, '')"
    with closing(Database(path)) as database:
        database.write_blocking(lambda connection: connection.execute(insert, ("x" * 200_000,)).rowcount)
    content = bytearray(path.read_bytes())
    content[-4096:] = b"\xff" * 4096
    path.write_bytes(content)
    with closing(Database(path, read_only=True)) as view:
        assert inspect(view).damage != ()


def test_an_empty_file_has_no_schema_yet(tmp_path: Path) -> None:
    (tmp_path / "appliance.db").touch()
    with closing(Database(tmp_path / "appliance.db", read_only=True)) as view:
        report = inspect(view)
    assert (report.schema_version, report.rows, report.damage) == (0, {}, ())


def test_this_python_has_a_sqlite_that_is_new_enough() -> None:
    assert sqlite_version() >= OLDEST_SQLITE


@pytest.mark.parametrize("module", ["appliance.store.database", "appliance.store.inspection"])
def test_the_server_does_not_pay_for_the_inspections_library(module: str) -> None:
    program = f"import sys, {module}; print('sqlite_utils' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == "False\n"
