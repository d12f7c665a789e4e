"""`appliance docs` against a server that listens."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from click.testing import CliRunner, Result

from appliance.cli import appliance
from tests.api.boxes import ScriptedBox, scripted_box

pytestmark = pytest.mark.anyio

Docs = Callable[..., Awaitable[Result]]


@pytest.fixture
async def box(tmp_path: Path) -> Any:
    async with scripted_box(tmp_path) as each:
        yield each


@pytest.fixture
def docs(box: ScriptedBox) -> Docs:
    async def run(*arguments: str, code: int = 0) -> Result:
        def invoke() -> Result:
            return CliRunner().invoke(appliance, ["docs", *arguments, "--url", box.url])

        result = await anyio.to_thread.run_sync(invoke)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def manuals(tmp_path: Path) -> Path:
    """Return a folder with three documents, and what is no document."""
    folder = tmp_path / "manuals"
    (folder / "old").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("heat")
    (folder / ".hidden").write_text("heat")
    (folder / "empty.txt").write_text("")
    (folder / "pump.txt").write_text("heat pumps move heat")
    (folder / 'fan "3" 风.txt').write_text("fans move air")
    (folder / "old" / "stove.txt").write_text("stoves make heat")
    (folder / "link.txt").symlink_to(folder / "pump.txt")
    return folder


async def test_a_folder_is_added_listed_and_searched(docs: Docs, manuals: Path) -> None:
    assert "3 sent to documents, 0 unchanged." in (await docs("add", str(manuals))).output
    listed = json.loads((await docs("list", "--json")).output)
    assert {each["name"] for each in listed} == {"manuals/pump.txt", 'manuals/fan "3" 风.txt', "manuals/old/stove.txt"}
    assert {each["status"] for each in listed} == {"completed"}
    assert "manuals/old/stove.txt" in (await docs("list")).output
    found = (await docs("search", "heat", "pumps")).output
    assert "1. manuals/pump.txt, page 3  Manual › Filter  1.00" in found
    assert "   heat pumps move heat" in found
    answer = json.loads((await docs("search", "heat", "--limit", "1", "--mode", "keyword", "--json")).output)
    assert [each["page"] for each in answer["data"]] == [3]
    assert "Nothing relevant" in (await docs("search", "submarine")).output


async def test_what_has_not_changed_is_not_sent_again_and_what_has_takes_the_old_ones_place(
    docs: Docs, box: ScriptedBox, manuals: Path
) -> None:
    await docs("add", str(manuals))
    (manuals / "pump.txt").write_text("pumps are gone")
    answer = json.loads((await docs("add", str(manuals), "--json")).output)
    assert (answer["sent"], answer["unchanged"], answer["failed"]) == (1, 2, [])
    assert sorted(box.files.contents.values()) == [b"fans move air", b"pumps are gone", b"stoves make heat"]


async def test_documents_are_removed_by_name_or_id_and_all_of_them(docs: Docs, box: ScriptedBox, manuals: Path) -> None:
    await docs("add", str(manuals), "--store", "mine")
    fan = next(name for name, content in box.files.contents.items() if b"fans" in content)
    assert "2 erased." in (await docs("remove", "manuals/pump.txt", fan, "--store", "mine")).output
    assert list(box.files.contents.values()) == [b"stoves make heat"]
    assert "no document 'x'" in (await docs("remove", "x", "--store", "mine", code=3)).output
    await docs("remove", "--store", "mine", code=2)
    await docs("remove", "x", "--all", "--store", "mine", code=2)
    assert len(box.files.contents) == 1
    assert json.loads((await docs("remove", "--all", "--store", "mine", "--json")).output)["removed"]
    assert box.files.contents == {}
    assert "There is no store 'mine'; there is none." in (await docs("list", "--store", "mine", code=3)).output


async def test_an_empty_store_says_how_it_is_filled(docs: Docs, box: ScriptedBox) -> None:
    box.stores.create(tenant="", name="documents")
    assert "appliance docs add" in (await docs("list")).output


async def test_a_name_that_two_stores_have_is_refused_with_their_ids(docs: Docs, box: ScriptedBox) -> None:
    first, second = (box.stores.create(tenant="", name="documents").id for _ in range(2))
    said = (await docs("list", code=5)).output
    assert first in said
    assert second in said
    await docs("list", "--store", second)


async def test_indexes_are_verified_and_rebuilt(docs: Docs, box: ScriptedBox) -> None:
    store = box.stores.create(tenant="", name="documents").id
    assert "what they should be" in (await docs("verify")).output
    box.stores.problems = ["Two chunks are missing."]
    said = (await docs("verify", code=4)).output
    assert "Two chunks are missing." in said
    assert "appliance docs rebuild" in said
    assert "are new" in (await docs("rebuild")).output
    assert box.stores.rebuilt == [store]


async def test_a_store_is_embedded_with_another_model(docs: Docs, box: ScriptedBox) -> None:
    store = box.stores.create(tenant="", name="documents").id
    assert "old vectors answer" in (await docs("reembed", "--no-wait")).output
    assert "is embedded with" in (await docs("reembed")).output
    assert json.loads((await docs("reembed", "--json")).output) == {"store": store, "model": "", "done": True}
    assert box.stores.reembedded == [store] * 3


async def test_a_large_file_is_sent_in_pieces(docs: Docs, box: ScriptedBox, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4 * 3000
    box.files._most_bytes = len(content)
    (tmp_path / "large.bin").write_bytes(content)
    await docs("add", str(tmp_path / "large.bin"), "--no-wait")
    assert list(box.files.contents.values()) == [content]


async def test_a_file_that_the_server_refuses_ends_the_verb(docs: Docs, box: ScriptedBox, tmp_path: Path) -> None:
    box.files._most_bytes = 10
    (tmp_path / "large.txt").write_bytes(b"x" * 1000)
    assert "too large" in (await docs("add", str(tmp_path / "large.txt"), code=1)).output


async def test_more_documents_than_a_page_has_are_all_known(docs: Docs, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for each in range(120):
        (folder / f"{each}.txt").write_text(f"heat {each}")
    await docs("add", str(folder), "--no-wait")
    assert len(json.loads((await docs("list", "--json")).output)) == 120
    assert "120 unchanged" in (await docs("add", str(folder))).output


@pytest.mark.parametrize("verb", ["add", "list", "search", "remove", "rebuild", "reembed", "verify"])
def test_each_verb_explains_itself_with_an_example(verb: str) -> None:
    said = CliRunner().invoke(appliance, ["docs", verb, "--help"]).output
    assert "Example" in said
    assert f"appliance docs {verb}" in " ".join(said.split())
