"""Embeddings from a server process, beside chats, to an orderly end."""

from __future__ import annotations

import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.journeys.processes import ServerProcess, appliance, server_process, wait_until
from tests.tiny_encoders import write_tiny_classifier, write_tiny_cross_encoder, write_tiny_encoder
from tests.tiny_gguf import write_tiny_bert


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """Return a data folder with the chat model `tiny` and the encoder `encoder`."""
    path = write_tiny_bert(tmp_path / "encoder.gguf")
    done = appliance("models", "import", str(path), "--name", "encoder", "--licence", "MIT", data=tiny_data)
    assert done.returncode == 0, done.stderr
    return tiny_data


def test_an_encoder_and_a_chat_model_embed_while_a_chat_streams(data: Path, tmp_path: Path) -> None:
    with server_process(data, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        with server.client() as client:
            alone = (
                client.completions.create(model="tiny", prompt="Hello", max_tokens=60, temperature=0).choices[0].text
            )
            stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=60, temperature=0, stream=True)
            texts = [next(stream).choices[0].text]
            for model in ("encoder", "tiny", "encoder", "tiny"):
                told = client.embeddings.create(model=model, input=["the dog", "the fox"] * 20)
                assert len(told.data) == 40
                assert all(math.hypot(*each.embedding) == pytest.approx(1, abs=1e-5) for each in told.data)
            texts += [chunk.choices[0].text for chunk in stream]
            assert "".join(texts) == alone
        assert server.metric("appliance_prompt_tokens_total") > 160
        assert server.metric("appliance_num_requests_running") == 0
        assert server.end() == 0
        assert "unloaded encoder:1 for embeddings" in server.log


def test_a_stop_ends_what_is_being_embedded(data: Path, tmp_path: Path) -> None:
    environment = {
        "APPLIANCE_SHUTDOWN_GRACE_S": "0.1",
        "APPLIANCE_MAX_EMBEDDING_INPUTS": "60000",
        "APPLIANCE_EMBEDDING_CACHE_BYTES": "0",  # it would compute the same input once
    }
    with server_process(data, tmp_path, "--model", "", environment=environment) as server:
        server.wait_until_listening()
        body = b'{"model": "encoder", "input": [' + b",".join([b"[" + b"9," * 127 + b"9]"] * 20_000) + b"]}"
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        import socket

        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: server.metric("appliance_num_requests_running") == 1)
            assert server.end() == 0
            assert connection.recv(100).startswith(b"HTTP/1.1 500")


def post(server: ServerProcess, path: str, document: dict[str, Any]) -> dict[str, Any]:
    response = server.pool.request("POST", server.url + path, json=document)
    assert response.status == 200, response.data
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.slow
def test_encoders_of_every_task_answer_and_what_was_embedded_survives_a_kill(data: Path, tmp_path: Path) -> None:
    for name, write in (
        ("vectors", write_tiny_encoder),
        ("cross", write_tiny_cross_encoder),
        ("classes", write_tiny_classifier),
    ):
        folder = str(write(tmp_path / name))
        done = appliance("models", "import", folder, "--name", name, "--licence", "MIT", data=data)
        assert done.returncode == 0, done.stderr
    texts = ["the pump stops", "the valve leaks", "why is the motor hot"]
    question = {"query": "why is the pump hot", "documents": texts}
    hits = "appliance_embedding_cache_hits_total"

    def reranked(server: ServerProcess) -> dict[str, Any]:
        return post(server, "/v1/rerank", {"model": "vectors", **question})

    def is_all_written(server: ServerProcess) -> bool:
        """The query came last: where it is found, all before it is on the disk."""
        before = server.metric(hits)
        reranked(server)
        return server.metric(hits) - before == len(texts) + 1

    first: list[list[float]] = []
    for number, reused in ((signal.SIGKILL, 0), (signal.SIGTERM, 6)):
        with server_process(data, tmp_path, "--model", "") as server:
            server.wait_until_listening()
            with server.client() as client:
                vectors = [
                    each.embedding
                    for model in ("vectors", "encoder")
                    for each in client.embeddings.create(model=model, input=texts).data
                ]
            assert vectors == (first or vectors)
            first = vectors
            assert server.metric(hits) == reused
            by_vectors = reranked(server)
            by_cross = post(server, "/v1/rerank", {"model": "cross", **question})
            assert (by_vectors["method"], by_cross["method"]) == ("embedding", "cross-encoder")
            for answer in (by_vectors, by_cross):
                scores = [each["relevance_score"] for each in answer["results"]]
                assert scores == sorted(scores, reverse=True)
            [found] = post(server, "/v1/classify", {"model": "classes", "input": texts[0]})["data"]
            assert found["label"] in ("calm", "loud", "broken")
            wait_until(partial(is_all_written, server))
            server.end(number)
