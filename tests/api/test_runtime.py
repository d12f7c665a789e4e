"""`GET` and `PATCH /v1/models/{model}/runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.observe.resources import physical_cores
from tests.api.boxes import Box, ScriptedBox, real_box, scripted_box

pytestmark = pytest.mark.anyio

PATH = "/v1/models/tiny/runtime"


async def test_what_is_changed_is_what_is_shown_and_the_rest_stays(any_box: Box) -> None:
    await any_box.chat(max_tokens=1)  # loads the model
    before = (await any_box.ask("GET", PATH)).json()
    changed = await any_box.ask("PATCH", PATH, {"threads": 1, "target_inter_token_latency_s": 0.25})
    assert changed.status == 200
    assert changed.json() == before | {"threads": 1, "target_inter_token_latency_s": 0.25}
    assert (await any_box.ask("GET", "/v1/models/tiny:1/runtime")).json() == changed.json()
    assert (await any_box.ask("PATCH", PATH, {"batch_tokens": 32, "threads": None})).json() == changed.json() | {
        "batch_tokens": 32
    }
    assert (await any_box.ask("PATCH", PATH, {})).json()["batch_tokens"] == 32
    assert (await any_box.chat(max_tokens=3)).status == 200


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"threads": -1}, "threads", "invalid_value"),
        ({"threads": 1025}, "threads", "invalid_value"),
        ({"threads": 1.5}, "threads", "invalid_value"),
        ({"threads": "2"}, "threads", "invalid_value"),
        ({"batch_tokens": 0}, "batch_tokens", "invalid_value"),
        ({"batch_tokens": 8192, "threads": 3}, "batch_tokens", "invalid_value"),
        ({"target_inter_token_latency_s": 0}, "target_inter_token_latency_s", "invalid_value"),
        ({"target_inter_token_latency_s": -1}, "target_inter_token_latency_s", "invalid_value"),
        ({"treads": 2}, "treads", "unknown_parameter"),
        ({"context_cells": 4096}, "context_cells", "unknown_parameter"),
        ([], None, "invalid_value"),
    ],
)
async def test_a_bad_value_is_refused_and_changes_nothing(any_box: Box, change: Any, param: str, code: str) -> None:
    await any_box.chat(max_tokens=1)
    before = (await any_box.ask("GET", PATH)).json()
    reply = await any_box.ask("PATCH", PATH, change)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)
    assert (await any_box.ask("GET", PATH)).json() == before


async def test_a_model_that_is_not_loaded_has_no_runtime(tmp_path: Path, tiny_model_path: Path) -> None:
    async with real_box(tmp_path, tiny_model_path) as box:
        for method, document in (("GET", None), ("PATCH", {"threads": 1})):
            reply = await box.ask(method, PATH, document)
            assert (reply.status, reply.error["code"]) == (404, "model_not_loaded")
            reply = await box.ask(method, "/v1/models/nobody/runtime", document)
            assert (reply.status, reply.error["code"]) == (404, "model_not_found")


async def test_no_threads_are_one_per_physical_core(tmp_path: Path, tiny_model_path: Path) -> None:
    async with real_box(tmp_path, tiny_model_path) as box:
        await box.chat(max_tokens=1)
        assert (await box.ask("PATCH", PATH, {"threads": 0})).json()["threads"] == physical_cores()


async def test_only_administrators_may_look_or_change(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        keys = {scope: box.keys.create(scope, [scope])[1] for scope in ("inference", "metrics", "admin")}
        statuses = {}
        for scope, key in keys.items():
            headers = {"authorization": f"Bearer {key}"}
            got = await box.ask("GET", PATH, headers=headers)
            patched = await box.ask("PATCH", PATH, {"threads": 7}, headers=headers)
            statuses[scope] = (got.status, patched.status)
            assert box.tuning.now.threads == (7 if scope == "admin" else 2)
        assert statuses == {"inference": (403, 403), "metrics": (403, 403), "admin": (200, 200)}


async def test_other_methods_are_refused_with_those_there_are(box: ScriptedBox) -> None:
    reply = await box.ask("POST", PATH, {"threads": 1})
    assert reply.status == 405
    assert reply.headers["allow"] == "GET, HEAD, OPTIONS, PATCH"
