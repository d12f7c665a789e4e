"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
from array import array
from pathlib import Path
from typing import Any

import pytest

from appliance.api.openai.embeddings import encoded
from appliance.core.errors import EngineError, OverloadedError
from appliance.core.types import EmbeddingRequest, Embeddings
from tests.api.boxes import Box, ScriptedBox, post, real_box, scripted_box, until, wire
from tests.tiny_gguf import write_tiny_bert

pytestmark = pytest.mark.anyio

PATH = "/v1/embeddings"


async def embed(box: Box, given: Any = "Hello", **fields: Any) -> Any:
    return await box.ask("POST", PATH, {"model": box.model, "input": given, **fields})


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("Hello", ["Hello"]),
        (["One", "二"], ["One", "二"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_every_form_of_an_input(box: ScriptedBox, given: Any, inputs: list[Any]) -> None:
    reply = await embed(box, given)
    assert reply.status == 200
    [request] = box.embedding.requests
    assert list(request.inputs) == inputs
    assert (request.truncate, request.dimensions) == (False, None)
    document = reply.json()
    assert (document["object"], document["model"]) == ("list", "tiny:1")
    assert [(each["object"], each["index"]) for each in document["data"]] == [
        ("embedding", index) for index in range(len(inputs))
    ]
    tokens = sum(len(each.encode() if isinstance(each, str) else each) for each in inputs)
    assert document["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [""]}, "input[0]", "invalid_value"),
        ({"input": [[]]}, "input[0]", "invalid_value"),
        ({"input": ["One", 2]}, "input", "invalid_value"),
        ({"input": [[1], "Two"]}, "input", "invalid_value"),
        ({"input": [-1]}, "input[0]", "invalid_value"),
        ({"input": None}, "input", "invalid_value"),
        ({"input": "a\0b"}, "input", "invalid_value"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "invalid_value"),
        ({"dimensions": 1.5}, "dimensions", "invalid_value"),
        ({"truncate": "yes"}, "truncate", "invalid_value"),
        ({"inputs": "x"}, "inputs", "unknown_parameter"),
        ({"model": ""}, "model", "invalid_value"),
    ],
)
async def test_a_request_that_will_not_do_is_refused(
    box: ScriptedBox, fields: dict[str, Any], param: str, code: str
) -> None:
    reply = await box.ask("POST", PATH, {"model": "tiny", "input": "Hello", **fields})
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)
    assert box.embedding.requests == []


async def test_so_many_inputs_and_characters_and_no_more(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_embedding_inputs=3, max_prompt_characters=10) as box:
        assert (await embed(box, ["x"] * 3)).status == 200
        reply = await embed(box, ["x"] * 4)
        assert (reply.status, reply.error["param"]) == (400, "input")
        assert "3 are allowed" in reply.error["message"]
        reply = await embed(box, ["123456", "123456"])
        assert (reply.status, reply.error["code"]) == (400, "prompt_too_long")
        assert len(box.embedding.requests) == 1


async def test_truncation_and_dimensions_are_asked_for(box: ScriptedBox) -> None:
    reply = await embed(box, truncate=True, dimensions=7, user="someone")
    assert len(reply.json()["data"][0]["embedding"]) == 7
    assert (box.embedding.requests[0].truncate, box.embedding.requests[0].dimensions) == (True, 7)
    assert reply.json()["truncated"] == []
    reply = await embed(box, ["x", "y" * 20_000], truncate=True)
    assert reply.json()["truncated"] == [1]
    assert reply.json()["usage"]["prompt_tokens"] == 10_001


@pytest.mark.parametrize("inputs", [2, 6000])  # the larger answer is written in a thread
async def test_base64_is_of_the_same_numbers(tmp_path: Path, inputs: int) -> None:
    async with scripted_box(tmp_path, max_embedding_inputs=inputs) as box:
        numbers = (await embed(box, ["x"] * inputs)).json()["data"]
        coded = (await embed(box, ["x"] * inputs, encoding_format="base64")).json()["data"]
    assert len(numbers) == inputs
    for one, other in zip(numbers, coded, strict=True):
        assert array("f", base64.b64decode(other["embedding"])).tolist() == one["embedding"]


def test_base64_is_little_endian_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = array("f", [1.0])
    embeddings = Embeddings("tiny:1", [vector], [1])
    assert base64.b64encode(bytes([0, 0, 0x80, 0x3F])) in encoded(embeddings, as_base64=True)
    monkeypatch.setattr("sys.byteorder", "big")
    assert base64.b64encode(bytes([0x3F, 0x80, 0, 0])) in encoded(embeddings, as_base64=True)
    assert vector == array("f", [1.0])


async def test_a_client_who_leaves_ends_the_work(box: ScriptedBox) -> None:
    import asyncio

    box.embedding.gate = asyncio.Event()
    async with wire(box) as connection:
        await connection.send(post(PATH, {"model": "tiny", "input": "Hello"}))
        await box.embedding.waiting.wait()
    await until(box.embedding.cancelled.is_set)


async def test_errors_of_the_floor_have_their_status(box: ScriptedBox, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [OverloadedError("3 wait.", retry_after_s=2.0), EngineError("Bad luck.")]

    async def refuse(_: EmbeddingRequest) -> Embeddings:
        raise refusals.pop(0)

    monkeypatch.setattr(box.embedding, "embed", refuse)
    reply = await embed(box)
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "overloaded", "2")
    assert (await embed(box)).status == 500


async def test_keys_need_the_scope_for_inference(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        for scope, status in (("metrics", 403), ("inference", 200)):
            _, secret = box.keys.create(scope, [scope])
            document = {"model": "tiny", "input": "x"}
            reply = await box.ask("POST", PATH, document, headers={"authorization": f"Bearer {secret}"})
            assert reply.status == status
        [request] = box.embedding.requests
        assert request.tenant.startswith("key_")
        assert request.request_id
        assert request.deadline_s == 600


async def test_an_encoder_and_a_chat_model_serve_side_by_side(tmp_path: Path, tiny_model_path: Path) -> None:
    encoder = write_tiny_bert(tmp_path / "encoder.gguf")
    async with real_box(tmp_path, tiny_model_path, encoder=encoder) as box:
        assert (await box.chat(max_tokens=3)).status == 200
        document = {"model": "encoder", "input": ["the dog", "the fox"]}
        reply = await box.ask("POST", PATH, document)
        assert reply.json()["model"] == "encoder:1"
        assert reply.json()["usage"]["prompt_tokens"] == 8
        assert [len(each["embedding"]) for each in reply.json()["data"]] == [32, 32]
        assert (await box.chat(max_tokens=3)).status == 200
        tasks = {each["id"]: each["task"] for each in (await box.ask("GET", "/v1/models")).json()["data"]}
        assert tasks == {"tiny": "chat", "encoder": "embedding"}
        for path, fields in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
            ("/v1/completions", {"prompt": "Hi"}),
        ):
            refusal = await box.ask("POST", path, {"model": "encoder", **fields})
            assert (refusal.status, refusal.error["param"]) == (400, "model")
            assert "/v1/embeddings" in refusal.error["message"]
        long = await box.ask("POST", PATH, {"model": "encoder", "input": "a " * 300})
        assert (long.status, long.error["code"]) == (400, "context_length_exceeded")
        cut = await box.ask("POST", PATH, {"model": "encoder", "input": "a " * 300, "truncate": True})
        assert cut.json()["usage"]["prompt_tokens"] == 128
        assert cut.json()["truncated"] == [0]
        refused = await box.ask("POST", PATH, {"model": "encoder", "input": "x", "dimensions": 16})
        assert (refused.status, refused.error["param"]) == (400, "dimensions")
