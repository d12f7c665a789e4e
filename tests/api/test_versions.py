"""`GET` and `PATCH /v1/models/{model}/version`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.boxes import ScriptedBox, real_box, scripted_box

pytestmark = pytest.mark.anyio

PATH = "/v1/models/tiny/version"


async def test_a_name_is_switched_by_a_wish_and_shows_it(tmp_path: Path, tiny_model_path: Path) -> None:
    async with real_box(tmp_path, tiny_model_path) as box:
        missing = await box.ask("GET", PATH)
        assert (missing.status, missing.error["code"]) == (404, "no_wish")
        reply = await box.ask("PATCH", PATH, {"version": "1", "test": False, "soak_s": 0})
        assert reply.status == 200
        wish = reply.json()
        assert (wish["version"], wish["state"], wish["origin"]) == ("1", "confirmed", "http")
        assert (await box.ask("GET", PATH)).json()["version"] == "1"
        reply = await box.ask("PATCH", PATH, {"version": None})
        assert (reply.status, reply.error["code"]) == (404, "no_previous_version")
        reply = await box.ask("PATCH", PATH, {"version": "7"})
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, None),
        ({"version": ""}, "version"),
        ({"version": 1}, "version"),
        ({"version": "1", "soak_s": -1}, "soak_s"),
        ({"version": "1", "soak_s": "long"}, "soak_s"),
        ({"version": "1", "tests": True}, "tests"),
    ],
)
async def test_a_bad_wish_is_refused_and_changes_nothing(box: ScriptedBox, change: Any, param: str | None) -> None:
    reply = await box.ask("PATCH", PATH, change)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert box.versions.wishes() == []


async def test_a_version_that_fails_its_test_is_not_wished_for(box: ScriptedBox) -> None:
    box.versions.passes = False
    reply = await box.ask("PATCH", PATH, {"version": "2"})
    assert (reply.status, reply.error["code"]) == (409, "self_test_failed")
    assert box.versions.wishes() == []
    assert (await box.ask("PATCH", PATH, {"version": "2", "test": False})).json()["state"] == "trial"


async def test_only_administrators_choose_versions(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        keys = {scope: box.keys.create(scope, [scope])[1] for scope in ("inference", "metrics", "admin")}
        statuses = {}
        for scope, key in keys.items():
            headers = {"authorization": f"Bearer {key}"}
            got = await box.ask("GET", PATH, headers=headers)
            patched = await box.ask("PATCH", PATH, {"version": "2"}, headers=headers)
            statuses[scope] = (got.status, patched.status)
        assert statuses == {"inference": (403, 403), "metrics": (403, 403), "admin": (200, 200)}
        [wish] = box.versions.wishes()
        assert wish.origin not in ("", "http")
