"""`POST /v1/rerank`."""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.request
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from appliance.api.openai.rerank import best_first
from appliance.core.encoders import Ranking, RerankRequest
from appliance.core.errors import OverloadedError, UnavailableError
from tests.api.boxes import Box, ScriptedBox, post, scripted_box, until, wire

pytestmark = pytest.mark.anyio

PATH = "/v1/rerank"
QUERY = "what moves heat"
DOCUMENTS = ["a cat", "a pump moves heat", "what moves", "what moves heat", "moves heat"]


async def rerank(box: Box, documents: Any = DOCUMENTS, **fields: Any) -> Any:
    return await box.ask("POST", PATH, {"model": box.model, "query": QUERY, "documents": documents, **fields})


async def test_the_best_come_first_and_equals_in_their_order(box: ScriptedBox) -> None:
    reply = await rerank(box)
    assert reply.status == 200
    answer = reply.json()
    assert [each["index"] for each in answer["results"]] == [3, 1, 2, 4, 0]
    assert [each["relevance_score"] for each in answer["results"]] == [0.75, 0.5, 0.5, 0.5, 0.0]
    assert all(set(each) == {"index", "relevance_score"} for each in answer["results"])
    assert answer["model"] == "tiny:1"
    assert answer["id"].startswith("rerank-")
    assert answer["object"] == "list"
    assert answer["method"] == "cross-encoder"
    assert answer["truncated"] == []
    tokens = sum(map(len, DOCUMENTS))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    [request] = box.classifiers.rerank_requests
    assert (request.model, request.query, list(request.documents)) == ("tiny", QUERY, DOCUMENTS)
    assert (request.truncate, request.tenant, request.deadline_s) == (False, "", 600)


@pytest.mark.parametrize(("top_n", "expected"), [(1, [3]), (2, [3, 1]), (5, [3, 1, 2, 4, 0]), (99, [3, 1, 2, 4, 0])])
async def test_top_n_is_how_many_come_back(box: ScriptedBox, top_n: int, expected: list[int]) -> None:
    answer = (await rerank(box, top_n=top_n)).json()
    assert [each["index"] for each in answer["results"]] == expected
    assert answer["usage"]["total_tokens"] == sum(map(len, DOCUMENTS)), "all of them were read"


def test_scores_below_0_are_in_order_too() -> None:
    assert best_first([-0.5, 0.25, -1.0, 0.25, 0.0], None) == [1, 3, 4, 0, 2]


async def test_documents_come_back_when_asked_for_and_may_be_objects(box: ScriptedBox) -> None:
    mixed = [{"text": "a cat"}, "what moves heat"]
    answer = (await rerank(box, mixed, return_documents=True)).json()
    assert [each["document"] for each in answer["results"]] == [{"text": "what moves heat"}, {"text": "a cat"}]
    assert list(box.classifiers.rerank_requests[0].documents) == ["a cat", "what moves heat"]


async def test_a_large_answer_is_written_in_a_thread_and_the_same(tmp_path: Path) -> None:
    documents = ["x" * 700_000, "what " + "y" * 700_000]
    async with scripted_box(tmp_path) as box:
        answer = (await rerank(box, documents, return_documents=True, truncate=True)).json()
    assert [each["document"]["text"] for each in answer["results"]] == [documents[1], documents[0]]
    assert answer["truncated"] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 20_000


async def test_the_answer_says_when_embeddings_were_compared(box: ScriptedBox) -> None:
    box.classifiers.method = "embedding"
    assert (await rerank(box)).json()["method"] == "embedding"


async def test_without_a_model_the_setting_decides(box: ScriptedBox) -> None:
    reply = await box.ask("POST", PATH, {"query": QUERY, "documents": DOCUMENTS})
    assert (reply.status, reply.json()["model"]) == (200, "tiny:1")
    assert box.classifiers.rerank_requests[0].model == ""


async def test_truncation_is_asked_for_and_said(box: ScriptedBox) -> None:
    answer = (await rerank(box, ["x", "y" * 20_000], truncate=True)).json()
    assert answer["truncated"] == [1]
    assert box.classifiers.rerank_requests[0].truncate


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"query": ""}, "query", "invalid_value"),
        ({"query": ["one"]}, "query", "invalid_value"),
        ({"query": None}, "query", "invalid_value"),
        ({"query": "a\0b"}, "query", "invalid_value"),
        ({"documents": []}, "documents", "invalid_value"),
        ({"documents": "one"}, "documents", "invalid_value"),
        ({"documents": [""]}, "documents[0]", "invalid_value"),
        ({"documents": [1]}, "documents[0]", "invalid_value"),
        ({"documents": [{"text": ""}]}, "documents[0].text", "invalid_value"),
        ({"documents": [{"image": "x"}]}, None, None),
        ({"documents": [{"text": "x", "title": "y"}]}, "documents[0].title", "unknown_parameter"),
        ({"top_n": 0}, "top_n", "invalid_value"),
        ({"top_n": -1}, "top_n", "invalid_value"),
        ({"top_n": 1.5}, "top_n", "invalid_value"),
        ({"return_documents": 1}, "return_documents", "invalid_value"),
        ({"truncate": "END"}, "truncate", "invalid_value"),
        ({"max_tokens_per_doc": 512}, "max_tokens_per_doc", "unsupported_parameter"),
        ({"max_chunks_per_doc": 3}, "max_chunks_per_doc", "unsupported_parameter"),
        ({"rank_fields": ["title"]}, "rank_fields", "unsupported_parameter"),
        ({"top_k": 3}, "top_k", "unknown_parameter"),
        ({"model": ""}, "model", "invalid_value"),
        ({"model": "nobody"}, "model", "not_found"),
    ],
)
async def test_a_request_that_will_not_do_is_refused(
    box: ScriptedBox, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    reply = await rerank(box, **{"documents": ["x"], **fields})
    assert reply.status == (404 if code == "not_found" else 400)
    if param is not None:
        assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert box.classifiers.rerank_requests == []


@pytest.mark.parametrize("missing", ["query", "documents"])
async def test_query_and_documents_are_needed(box: ScriptedBox, missing: str) -> None:
    document = {"query": QUERY, "documents": DOCUMENTS}
    del document[missing]
    reply = await box.ask("POST", PATH, document)
    assert reply.status == 400
    assert missing in reply.error["message"]


async def test_null_is_the_default(box: ScriptedBox) -> None:
    fields = ("model", "top_n", "return_documents", "truncate", "max_tokens_per_doc", "rank_fields", "user")
    assert (await rerank(box, **dict.fromkeys(fields))).status == 200


async def test_so_many_documents_and_characters_and_no_more(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_rerank_documents=3, max_prompt_characters=len(QUERY) + 10) as box:
        assert (await rerank(box, ["x"] * 3)).status == 200
        reply = await rerank(box, ["x"] * 4)
        assert (reply.status, reply.error["param"]) == (400, "documents")
        assert "3 are allowed" in reply.error["message"]
        reply = await rerank(box, ["12345", {"text": "123456"}])
        assert (reply.status, reply.error["code"]) == (400, "prompt_too_long")
        assert len(box.classifiers.rerank_requests) == 1


async def test_a_client_who_leaves_ends_the_work(box: ScriptedBox) -> None:
    box.classifiers.gate = asyncio.Event()
    async with wire(box) as connection:
        await connection.send(post(PATH, {"query": QUERY, "documents": DOCUMENTS}))
        await box.classifiers.waiting.wait()
    await until(box.classifiers.cancelled.is_set)


async def test_errors_of_the_floor_have_their_status(box: ScriptedBox, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [OverloadedError("3 wait.", retry_after_s=2.0), UnavailableError("It failed too often.")]

    async def refuse(_: RerankRequest) -> Ranking:
        raise refusals.pop(0)

    monkeypatch.setattr(box.classifiers, "rerank", refuse)
    reply = await rerank(box)
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "overloaded", "2")
    assert (await rerank(box)).status == 503


async def test_keys_need_the_scope_for_inference(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        document = {"query": QUERY, "documents": DOCUMENTS}
        assert (await box.ask("POST", PATH, document)).status == 401
        for scope, status in (("metrics", 403), ("inference", 200)):
            _, secret = box.keys.create(scope, [scope])
            reply = await box.ask("POST", PATH, document, headers={"authorization": f"Bearer {secret}"})
            assert reply.status == status
        [request] = box.classifiers.rerank_requests
        assert request.tenant.startswith("key_")
        assert request.request_id


async def test_plain_http_clients_are_served(box: ScriptedBox) -> None:
    body = json.dumps({"model": "tiny", "query": QUERY, "documents": DOCUMENTS, "top_n": 1}).encode()

    def by_urllib() -> Any:
        request = urllib.request.Request(box.url + PATH, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)

    def by_http_client() -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=20)
        connection.request("POST", PATH, body)  # says nothing about the media type
        with connection.getresponse() as response:
            found = json.load(response)
        connection.close()
        return found

    for client in (by_urllib, by_http_client):
        answer = await anyio.to_thread.run_sync(client)
        assert answer["results"] == [{"index": 3, "relevance_score": 0.75}]
