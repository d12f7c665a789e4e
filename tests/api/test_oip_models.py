"""The Open Inference Protocol's health, metadata, statistics and repository."""

from __future__ import annotations

from typing import Any

import pytest

from appliance import __version__
from appliance.core.errors import ModelFileError
from appliance.core.types import Health
from tests.api.boxes import ScriptedBox

pytestmark = pytest.mark.anyio


async def test_the_server_names_its_extensions(box: ScriptedBox) -> None:
    document = (await box.ask("GET", "/v2")).json()
    assert (document["name"], document["version"]) == ("appliance", __version__)
    assert document["extensions"] == [
        "binary_tensor_data",
        "classification",
        "model_repository",
        "schedule_policy",
        "statistics",
    ]


async def test_health_is_200_or_400(box: ScriptedBox) -> None:
    assert (await box.ask("GET", "/v2/health/live")).json() == {"live": True}
    assert (await box.ask("GET", "/v2/health/ready")).json() == {"ready": True}
    box.health.now = Health(ready=False, reason="loading echo")
    reply = await box.ask("GET", "/v2/health/ready")
    assert (reply.status, reply.inference_error) == (400, "Not ready: loading echo.")
    assert (await box.ask("GET", "/v2/health/live")).status == 200


@pytest.mark.parametrize("path", ["/v2/models/echo", "/v2/models/echo/versions/1"])
async def test_a_model_shows_its_tensors_and_what_it_runs_with(box: ScriptedBox, path: str) -> None:
    tensor = {"name": "fp32", "datatype": "FP32", "shape": [-1, -1]}
    assert (await box.ask("GET", path)).json() == {
        "name": "echo",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [tensor],
        "outputs": [tensor],
        "parameters": {"execution_providers": "CPUExecutionProvider", "threads": "1"},
    }


async def test_a_model_is_ready_when_it_is_loaded(box: ScriptedBox) -> None:
    assert (await box.ask("GET", "/v2/models/echo/ready")).json() == {"name": "echo", "ready": True}
    assert (await box.ask("GET", "/v2/models/echo/versions/2/ready")).status == 200
    reply = await box.ask("GET", "/v2/models/echo/versions/1/ready")
    assert reply.status == 400
    assert "is not ready" in reply.inference_error


@pytest.mark.parametrize("rest", ["", "/ready", "/stats", "/versions/3", "/versions/3/ready", "/versions/3/stats"])
@pytest.mark.parametrize("name", ["other", "echo"])
async def test_an_unknown_model_or_version_is_404(box: ScriptedBox, name: str, rest: str) -> None:
    reply = await box.ask("GET", f"/v2/models/{name}{rest}")
    assert reply.status == (404 if name == "other" or "3" in rest else 200)
    assert reply.status == 200 or "there is echo" in reply.inference_error


@pytest.mark.parametrize("path", ["/v2/models/stats", "/v2/models/echo/stats", "/v2/models/echo/versions/2/stats"])
async def test_statistics_are_in_nanoseconds(box: ScriptedBox, path: str) -> None:
    [figures] = (await box.ask("GET", path)).json()["model_stats"]
    none: dict[str, Any] = {"count": 0, "ns": 0}
    assert (figures["name"], figures["version"], figures["last_inference"]) == ("echo", "2", 1500)
    assert (figures["inference_count"], figures["execution_count"]) == (8, 2)
    times = figures["inference_stats"]
    assert times["success"] == {"count": 0, "ns": 500_000_000}
    assert times["queue"] == {"count": 1, "ns": 1}
    assert times["cancel"] == times["cache_hit"] == times["cache_miss"] == times["fail"] == none
    assert [each["batch_size"] for each in figures["batch_stats"]] == [1, 4]


async def test_the_index_lists_all_models_or_those_that_are_ready(box: ScriptedBox) -> None:
    ready = {"name": "echo", "version": "2", "state": "READY"}
    unloaded = {"name": "echo", "version": "1", "state": "UNAVAILABLE", "reason": "not loaded"}
    assert (await box.ask("POST", "/v2/repository/index")).json() == [unloaded, ready]
    assert (await box.ask("POST", "/v2/repository/index", {"ready": False})).json() == [unloaded, ready]
    assert (await box.ask("POST", "/v2/repository/index", {"ready": True})).json() == [ready]
    reply = await box.ask("POST", "/v2/repository/index", {"ready": "yes"})
    assert (reply.status, "ready: expected `bool" in reply.inference_error) == (400, True)


async def test_unload_and_load(box: ScriptedBox) -> None:
    document = {"parameters": {"unload_dependents": True}}
    assert (await box.ask("POST", "/v2/repository/models/echo/unload", document)).status == 200
    assert not box.tensors.is_loaded
    assert (await box.ask("GET", "/v2/models/echo/stats")).json() == {"model_stats": []}
    reply = await box.ask("POST", "/v2/repository/models/echo/load")
    assert (reply.status, reply.json()) == (200, {})
    assert box.tensors.is_loaded


async def test_a_model_that_cannot_be_loaded_says_why(box: ScriptedBox) -> None:
    box.tensors.refusals.append(ModelFileError("The file is cut off."))
    reply = await box.ask("POST", "/v2/repository/models/echo/load")
    assert (reply.status, reply.inference_error) == (400, "The file is cut off.")
    assert (await box.ask("POST", "/v2/repository/models/other/load")).status == 404
    assert (await box.ask("POST", "/v2/repository/models/other/unload")).status == 404


async def test_files_and_configurations_do_not_come_with_a_request(box: ScriptedBox) -> None:
    document = {"parameters": {"file:1/model.onnx": "AAAA", "config": "{}"}}
    reply = await box.ask("POST", "/v2/repository/models/echo/load", document)
    assert reply.status == 400
    assert "is no parameter of this request" in reply.inference_error
