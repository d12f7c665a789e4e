"""`POST /v1/classify`."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from appliance.core.encoders import ClassificationRequest, Classifications
from appliance.core.errors import EngineError, InvalidRequestError
from tests.api.boxes import Box, ScriptedBox, post, scripted_box, until, wire

pytestmark = pytest.mark.anyio

PATH = "/v1/classify"


async def classify(box: Box, given: Any = "good", **fields: Any) -> Any:
    return await box.ask("POST", PATH, {"model": box.model, "input": given, **fields})


async def test_each_input_has_its_label_and_every_labels_probability(box: ScriptedBox) -> None:
    reply = await classify(box, ["a bad day", "a good day"])
    assert reply.status == 200
    answer = reply.json()
    assert (answer["object"], answer["model"], answer["exclusive"]) == ("list", "tiny:1", True)
    assert answer["id"].startswith("classify-")
    assert answer["created"] > 1_700_000_000
    assert answer["truncated"] == []
    assert answer["usage"] == {"prompt_tokens": 19, "total_tokens": 19}
    assert answer["data"] == [
        {
            "index": 0,
            "label": "bad",
            "score": 0.7,
            "scores": [
                {"label": "bad", "score": 0.7},
                {"label": "good", "score": 0.2},
                {"label": "neutral", "score": 0.1},
            ],
            "probs": [0.1, 0.2, 0.7],
            "num_classes": 3,
        },
        {
            "index": 1,
            "label": "good",
            "score": 0.7,
            "scores": [
                {"label": "good", "score": 0.7},
                {"label": "bad", "score": 0.2},
                {"label": "neutral", "score": 0.1},
            ],
            "probs": [0.1, 0.7, 0.2],
            "num_classes": 3,
        },
    ]
    [request] = box.classifiers.classification_requests
    assert (request.model, list(request.inputs), request.truncate) == ("tiny", ["a bad day", "a good day"], False)
    assert request.deadline_s == 600


async def test_one_text_is_one_input_and_labels_may_stand_alone(box: ScriptedBox) -> None:
    box.classifiers.exclusive = False
    answer = (await classify(box, "good and bad")).json()
    assert answer["exclusive"] is False
    [found] = answer["data"]
    assert [each["label"] for each in found["scores"]] == ["good", "bad", "neutral"]


@pytest.mark.parametrize("inputs", [1, 900])  # the larger answer is written in a thread
async def test_truncation_is_asked_for_and_said(box: ScriptedBox, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.api.openai.classify.ENCODE_IN_THREAD_NUMBERS", 100)
    answer = (await classify(box, [*["x"] * inputs, "y" * 20_000], truncate=True)).json()
    assert answer["truncated"] == [inputs]
    assert answer["usage"]["prompt_tokens"] == inputs + 10_000
    assert [each["index"] for each in answer["data"]] == list(range(inputs + 1))
    assert box.classifiers.classification_requests[0].truncate


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [""]}, "input[0]", "invalid_value"),
        ({"input": [1, 2]}, "input[0]", "invalid_value"),
        ({"input": None}, "input", "invalid_value"),
        ({"input": "a\0b"}, "input", "invalid_value"),
        ({"truncate": "yes"}, "truncate", "invalid_value"),
        ({"inputs": "x"}, "inputs", "unknown_parameter"),
        ({"raw_scores": True}, "raw_scores", "unknown_parameter"),
        ({"model": ""}, "model", "invalid_value"),
        ({"model": "nobody"}, "model", "not_found"),
    ],
)
async def test_a_request_that_will_not_do_is_refused(
    box: ScriptedBox, fields: dict[str, Any], param: str, code: str
) -> None:
    reply = await box.ask("POST", PATH, {"model": "tiny", "input": "x", **fields})
    assert reply.status == (404 if code == "not_found" else 400)
    assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert box.classifiers.classification_requests == []


async def test_so_many_inputs_and_characters_and_no_more(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_rerank_documents=3, max_prompt_characters=10) as box:
        assert (await classify(box, ["x"] * 3)).status == 200
        reply = await classify(box, ["x"] * 4)
        assert (reply.status, reply.error["param"]) == (400, "input")
        assert "3 are allowed" in reply.error["message"]
        reply = await classify(box, ["123456", "123456"])
        assert (reply.status, reply.error["code"]) == (400, "prompt_too_long")
        assert len(box.classifiers.classification_requests) == 1


async def test_a_client_who_leaves_ends_the_work(box: ScriptedBox) -> None:
    box.classifiers.gate = asyncio.Event()
    async with wire(box) as connection:
        await connection.send(post(PATH, {"model": "tiny", "input": "x"}))
        await box.classifiers.waiting.wait()
    await until(box.classifiers.cancelled.is_set)


async def test_errors_of_the_floor_have_their_status(box: ScriptedBox, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [InvalidRequestError("It has no labels.", param="model"), EngineError("Bad luck.")]

    async def refuse(_: ClassificationRequest) -> Classifications:
        raise refusals.pop(0)

    monkeypatch.setattr(box.classifiers, "classify", refuse)
    reply = await classify(box)
    assert (reply.status, reply.error["param"]) == (400, "model")
    assert (await classify(box)).status == 500


async def test_keys_need_the_scope_for_inference(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        for scope, status in (("metrics", 403), ("inference", 200)):
            _, secret = box.keys.create(scope, [scope])
            document = {"model": "tiny", "input": "x"}
            reply = await box.ask("POST", PATH, document, headers={"authorization": f"Bearer {secret}"})
            assert reply.status == status
        [request] = box.classifiers.classification_requests
        assert request.tenant.startswith("key_")
        assert request.request_id


async def test_a_plain_http_client_is_served(box: ScriptedBox) -> None:
    def ask() -> Any:
        body = json.dumps({"model": "tiny", "input": "good"}).encode()
        request = urllib.request.Request(box.url + PATH, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)

    assert (await anyio.to_thread.run_sync(ask))["data"][0]["label"] == "good"
