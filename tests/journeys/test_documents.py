"""Documents go in, are found by word and by meaning, and are erased to the last byte, whenever the server is killed."""

from __future__ import annotations

import functools
import signal
import sqlite3
from collections.abc import Callable, Iterator
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


WITHOUT_EMBEDDER = {"APPLIANCE_EMBEDDING_MODEL": "none"}


def doors(client: openai.OpenAI) -> dict[str, Callable[[], object]]:
    """Return a call of each kind by its name."""
    files, stores = client.files, client.vector_stores
    return {
        "upload": lambda: files.create(file=("manual.md", MARKDOWN.encode()), purpose="assistants"),
        "list files": files.list,
        "get file": lambda: files.retrieve("file-1"),
        "read file": lambda: files.content("file-1"),
        "delete file": lambda: files.delete("file-1"),
        "make store": stores.create,
        "list stores": stores.list,
        "get store": lambda: stores.retrieve("vs_1"),
        "change store": lambda: stores.update("vs_1", name="manuals"),
        "delete store": lambda: stores.delete("vs_1"),
        "search": lambda: stores.search("vs_1", query="oil"),
        "rebuild": lambda: client.post("/vector_stores/vs_1/rebuild", cast_to=object),
        "reembed": lambda: client.post("/vector_stores/vs_1/reembed", cast_to=object),
        "verify": lambda: client.get("/vector_stores/vs_1/verify", cast_to=object),
        "add file": lambda: stores.files.create(vector_store_id="vs_1", file_id="file-1"),
        "list files of store": lambda: stores.files.list("vs_1"),
        "get file of store": lambda: stores.files.retrieve("file-1", vector_store_id="vs_1"),
        "change file of store": lambda: stores.files.update("file-1", vector_store_id="vs_1", attributes={"part": "B"}),
        "read file of store": lambda: stores.files.content("file-1", vector_store_id="vs_1"),
        "remove file of store": lambda: stores.files.delete("file-1", vector_store_id="vs_1"),
        "make batch": lambda: stores.file_batches.create("vs_1", file_ids=["file-1"]),
        "get batch": lambda: stores.file_batches.retrieve("vsfb_1", vector_store_id="vs_1"),
        "list files of batch": lambda: stores.file_batches.list_files("vsfb_1", vector_store_id="vs_1"),
        "cancel batch": lambda: stores.file_batches.cancel("vsfb_1", vector_store_id="vs_1"),
    }


def check_refused(server: ServerProcess, owner: int) -> None:
    """Try each door."""
    for name, call in doors(server.client()).items():
        with pytest.raises(openai.InternalServerError) as caught:
            call()
        assert (caught.value.status_code, caught.value.code) == (503, "retrieval_in_use"), name
        assert f"in use by process {owner}." in str(caught.value), name


def test_a_second_server_on_a_folder_refuses_documents_until_it_is_started_without_the_first(
    tiny_data: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / each for each in ("first", "second", "third")]
    for each in folders:
        each.mkdir()
    with server_process(tiny_data, folders[0], "--model", "", environment=WITHOUT_EMBEDDER) as first:
        first.wait_until_ready()
        with server_process(tiny_data, folders[1], "--model", "tiny", environment=WITHOUT_EMBEDDER) as second:
            second.wait_until_ready()
            check_refused(second, first.process.pid)
            assert second.log.count(f"in use by process {first.process.pid}.") == 3
            with second.client() as client:
                for call in (client.conversations.create, functools.partial(client.responses.retrieve, "resp_1")):
                    with pytest.raises(openai.InternalServerError) as caught:
                        call()
                    assert (caught.value.status_code, caught.value.code) == (503, "sessions_in_use")
            assert second.client().completions.create(model="tiny", prompt="hello", max_tokens=1).choices
            told = appliance("docs", "list", "--url", second.url, data=tiny_data)
            assert told.returncode != 0
            assert f"in use by process {first.process.pid}." in told.stderr
            store = first.client().vector_stores.create(name="manuals").id
            owner = first.process.pid
            assert first.end(signal.SIGKILL) == -signal.SIGKILL
            check_refused(second, owner)
            assert second.end() == 0
    with server_process(tiny_data, folders[2], "--model", "", environment=WITHOUT_EMBEDDER) as third:
        third.wait_until_ready()
        assert [each.id for each in third.client().vector_stores.list()] == [store]
        assert third.end() == 0


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
