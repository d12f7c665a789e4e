"""Documents go in, are found by word and by meaning, and are erased to the last byte, whenever the server is killed."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import openai
import pytest

from tests.journeys.processes import ServerProcess, appliance, server_process, wait_until
from tests.retrieval.documents import write_pdf
from tests.tiny_gguf import write_tiny_bert

MARKDOWN = """# Compressor manual

## Filters

The zyxogram filter is changed after 4000 hours of work.

## Oil

Drain the quibblesump oil while it is warm.
"""
FILTER = "The zyxogram filter is changed after 4000 hours of work."
PAGES = ("The first page is about safety.", "Turn the frobnitz valve clockwise.")
SECRETS = (b"zyxogram", b"quibblesump", b"frobnitz")


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """Return a data folder with an encoder."""
    path = write_tiny_bert(tmp_path / "encoder.gguf")
    done = appliance("models", "import", str(path), "--name", "encoder", "--licence", "MIT", data=tiny_data)
    assert done.returncode == 0, done.stderr
    return tiny_data


ENVIRONMENT = {"APPLIANCE_EMBEDDING_MODEL": "encoder"}


def files_with(folder: Path, secrets: tuple[bytes, ...]) -> Iterator[str]:
    """Yield the files in which a secret stands."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "models" not in path.parts and any(each in path.read_bytes() for each in secrets):
            yield str(path.relative_to(folder))


def found(client: openai.OpenAI, store: str, query: str, mode: str = "hybrid") -> list[tuple[str, str, object, object]]:
    """Return file name, text, page and heading of each hit."""
    hits = client.vector_stores.search(store, query=query, extra_body={"mode": mode}).data
    more = [each.model_extra or {} for each in hits]
    return [
        (hit.filename, hit.content[0].text, extra["page"], extra["heading"])
        for hit, extra in zip(hits, more, strict=True)
    ]


def until_taken_in(server: ServerProcess, store: str, files: int) -> None:
    client = server.client()

    def tell() -> str:
        return f"{list(client.vector_stores.files.list(store))} {server.log}"

    wait_until(lambda: client.vector_stores.retrieve(store).file_counts.completed == files, tell)


def check_found(client: openai.OpenAI, store: str) -> None:
    """Look for what the Markdown file and the PDF say, in each leg."""
    [(name, text, page, heading), *_] = found(client, store, "zyxogram filter")
    assert (name, page, heading) == ("manual.md", None, ["Compressor manual", "Filters"])
    assert FILTER in text
    [(name, text, page, _), *_] = found(client, store, "frobnitz", "keyword")
    assert (name, page) == ("safety.pdf", 1)  # where the passage begins
    assert "clockwise" in text
    files = {name for name, *_ in found(client, store, text, "semantic")}
    assert "safety.pdf" in files


def test_documents_are_found_and_then_gone_though_the_server_is_killed(data: Path, tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "safety.pdf", PAGES)
    with server_process(data, tmp_path, "--model", "", environment=ENVIRONMENT) as server:
        server.wait_until_ready()
        client = server.client()
        store = client.vector_stores.create(name="manuals").id
        files = [
            client.files.create(file=("manual.md", MARKDOWN.encode()), purpose="assistants").id,
            client.files.create(file=pdf, purpose="assistants").id,
        ]
        client.vector_stores.file_batches.create(store, file_ids=files)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL

    with server_process(data, tmp_path, "--model", "", environment=ENVIRONMENT) as server:
        server.wait_until_ready()
        client = server.client()
        until_taken_in(server, store, 2)
        check_found(client, store)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL

    with server_process(data, tmp_path, "--model", "", environment=ENVIRONMENT) as server:
        server.wait_until_ready()
        client = server.client()
        check_found(client, store)
        assert verified(server, store) == []
        assert list(files_with(data, SECRETS))
        client.files.delete(files[0])
        assert found(client, store, "zyxogram", "keyword") == []
        assert "manual.md" not in {name for name, *_ in found(client, store, FILTER)}
        assert list(files_with(data, SECRETS[:2])) == []
        client.vector_stores.delete(store)
        client.files.delete(files[1])
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        assert list(files_with(data, SECRETS)) == []

    with server_process(data, tmp_path, "--model", "", environment=ENVIRONMENT) as server:
        server.wait_until_ready()
        client = server.client()
        assert list(client.files.list()) == []
        assert list(client.vector_stores.list()) == []
        assert server.end() == 0


def verified(server: ServerProcess, store: str) -> list[str]:
    """Rebuild a store's indexes and return what is wrong with them."""
    client = server.client()
    client.post(f"/vector_stores/{store}/rebuild", cast_to=object)
    answer = client.get(f"/vector_stores/{store}/verify", cast_to=dict)
    problems: list[str] = answer["problems"]
    return problems


def test_without_an_embedder_documents_are_found_by_word(tiny_data: Path, tmp_path: Path) -> None:
    with server_process(
        tiny_data, tmp_path, "--model", "", environment={"APPLIANCE_EMBEDDING_MODEL": "none"}
    ) as server:
        server.wait_until_ready()
        client = server.client()
        store = client.vector_stores.create().id
        taken = client.vector_stores.files.upload_and_poll(
            vector_store_id=store, file=("manual.md", MARKDOWN.encode()), poll_interval_ms=50
        )
        assert (taken.status, taken.last_error) == ("completed", None)
        [(name, text, _, _), *_] = found(client, store, "zyxogram")
        assert name == "manual.md"
        assert FILTER in text
        assert server.end() == 0


def test_the_embedding_cache_keeps_nothing_of_a_file(data: Path, tmp_path: Path) -> None:
    with server_process(data, tmp_path, "--model", "", environment=ENVIRONMENT) as server:
        server.wait_until_ready()
        client = server.client()
        store = client.vector_stores.create().id
        taken = client.vector_stores.files.upload_and_poll(
            vector_store_id=store, file=("manual.md", MARKDOWN.encode()), poll_interval_ms=50
        )
        assert (taken.model_extra or {})["embedded"] > 0
        client.embeddings.create(model="encoder", input="what a client embeds itself is kept")
        assert server.end() == 0
    with closing(sqlite3.connect(data / "cache.db")) as cache:
        assert cache.execute("SELECT count(*) FROM embeddings").fetchone() == (1,)


def test_a_store_changes_to_an_embedder_of_another_dimension(data: Path, tmp_path: Path) -> None:
    path = write_tiny_bert(tmp_path / "wide.gguf", embedding=64, seed=1)
    done = appliance("models", "import", str(path), "--name", "wide", "--licence", "MIT", data=data)
    assert done.returncode == 0, done.stderr
    with server_process(data, tmp_path, "--model", "", environment=ENVIRONMENT) as server:
        server.wait_until_ready()
        client = server.client()
        store = client.vector_stores.create(name="documents").id
        client.vector_stores.files.upload_and_poll(
            vector_store_id=store, file=("manual.md", MARKDOWN.encode()), poll_interval_ms=50
        )
        assert found(client, store, FILTER, "semantic")
        assert server.end() == 0

    environment = {"APPLIANCE_EMBEDDING_MODEL": "wide"}
    with server_process(data, tmp_path, "--model", "", environment=environment) as server:
        server.wait_until_ready()
        client = server.client()
        assert found(client, store, FILTER, "semantic"), "the old embedder still answers"
        file = client.files.create(file=("more.md", b"More about oil."), purpose="assistants").id
        with pytest.raises(openai.ConflictError, match="appliance docs reembed"):
            client.vector_stores.files.create(store, file_id=file)
        done = appliance("docs", "reembed", "--url", server.url, data=data)
        assert done.returncode == 0, done.stderr
        assert "is embedded with wide:" in done.stdout
        assert found(client, store, FILTER, "semantic")
        answer = client.get(f"/vector_stores/{store}/verify", cast_to=dict)
        assert answer["problems"] == []
        taken = client.vector_stores.files.create_and_poll(file, vector_store_id=store, poll_interval_ms=50)
        assert taken.status == "completed"
        assert server.end() == 0
