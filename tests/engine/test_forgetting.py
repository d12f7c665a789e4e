"""A deleted session leaves nothing behind: no slot, no state in RAM, no byte of a state on disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.core.errors import StorageError
from appliance.core.types import SamplingParams
from appliance.engine.llama.state_files import StateFiles, erase_sessions
from appliance.engine.llama.state_format import StateHead
from tests.engine.conftest import EngineUnderTest, collect
from tests.engine.states import FINGERPRINT, state
from tests.engine.test_parking import OTHER, PAST, files, parking

pytestmark = pytest.mark.anyio

GREEDY = SamplingParams(temperature=0, max_tokens=8, top_logprobs=0, ignore_eos=True)
CONNECTED = "and then, one morning, without a word, the whole town went down to the river. " * 2


async def say(subject: EngineUnderTest, text: str, session: str = "", *, pinned: bool = False) -> int:
    """Run one answer and return how many of its prompt's tokens were cached."""
    generation = subject.engine.submit(await subject.tokens(text), GREEDY, session=session, pinned=pinned)
    await collect(generation)
    return generation.usage.cached_tokens


def payloads(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in files(folder)}


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_forgotten_session_is_computed_anew_and_others_are_not(
    tiny_model_path: Path, tmp_path: Path, pinned: bool
) -> None:
    folder = tmp_path / "kv"
    async with parking(tiny_model_path, folder) as subject:
        await say(subject, PAST, "gone", pinned=pinned)
        await say(subject, OTHER, "stays")
        await subject.until(lambda: len(files(folder)) >= 2)
        await subject.engine.forget({"gone"})
        keeper = subject.engine._worker.runner.keeper
        assert {each.session for each in keeper.states._states.values()} <= {"stays"}
        assert len(files(folder)) == 1
        assert await say(subject, OTHER, "stays") > 0
        assert await say(subject, PAST, "new") <= 1, "at most the begin token, which all share"
        subject.engine._worker.runner.keeper.states.check_integrity()


async def test_no_byte_of_a_forgotten_session_is_left_on_disk_after_the_model_is_unloaded(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    async with parking(tiny_model_path, folder) as first:
        await say(first, PAST, "gone")
        tokens = await first.tokens(PAST)
    marks = [each[-4096:] for each in payloads(folder).values()]
    assert len(marks) == 1
    async with parking(tiny_model_path, folder) as second:
        await second.engine.forget({"gone"})
    assert payloads(folder) == {}
    async with parking(tiny_model_path, folder) as third:
        assert await say(third, PAST, "again") == 0
        assert len(tokens) > 32


async def test_a_session_that_is_forgotten_while_it_answers_leaves_nothing(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    async with parking(tiny_model_path, folder) as subject:
        generation = subject.engine.submit(await subject.tokens(PAST), endless, session="gone", pinned=True)
        await subject.until(lambda: generation.first_token_at is not None)
        await subject.engine.forget({"gone"})
        assert not generation.ended
        [answer] = await collect(generation)
        assert answer.text
        assert await say(subject, PAST) <= 1
    assert all(b"gone" not in each for each in payloads(folder).values())


async def test_a_request_that_read_its_text_before_it_was_deleted_leaves_nothing(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    async with parking(tiny_model_path, folder) as subject:
        late = subject.engine.submit(await subject.tokens(PAST), GREEDY, session="gone", kept=False)
        await collect(late)
        assert await say(subject, OTHER) <= 1
        assert await say(subject, CONNECTED) <= 1
    assert all(b"gone" not in each for each in payloads(folder).values())
    assert len(payloads(folder)) == 2


async def test_forgetting_ends_only_after_the_file_that_was_being_written_is_gone(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "kv", StateFiles.write
    loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def slow(self: StateFiles, head: StateHead, payload: object) -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        write(self, head, payload)  # type: ignore[arg-type]

    monkeypatch.setattr(StateFiles, "write", slow)
    async with parking(tiny_model_path, folder) as subject, asyncio.timeout(60):
        await say(subject, PAST, "gone")
        await begun.wait()
        async with asyncio.TaskGroup() as tasks:
            forgetting = tasks.create_task(subject.engine.forget({"gone"}))
            await say(subject, OTHER)
            assert not forgetting.done()
            go_on.set()
        assert all(b"gone" not in each for each in payloads(folder).values())


async def test_a_file_that_cannot_be_deleted_is_told(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kv"
    async with parking(tiny_model_path, folder) as subject:
        await say(subject, PAST, "gone")
        await subject.until(lambda: len(files(folder)) == 1)
        with monkeypatch.context() as broken:
            broken.setattr(StateFiles, "erase", refuse)
            with pytest.raises(StorageError, match="the disk is gone"):
                await subject.engine.forget({"gone"})


def refuse(_: StateFiles, state_id: str) -> None:
    raise StorageError(f"{state_id}: the disk is gone.")


async def test_without_a_folder_it_is_forgotten_in_memory(tiny_model_path: Path) -> None:
    async with parking(tiny_model_path) as subject:
        await say(subject, PAST, "gone")
        await say(subject, OTHER, "stays")  # beside it the past is parked in RAM
        await subject.engine.forget({"gone"})
        assert await say(subject, PAST) <= 1


def test_files_of_models_that_are_not_loaded_are_found_by_their_heads(tmp_path: Path) -> None:
    root, kept = tmp_path / "kv", []
    assert erase_sessions(root, {"gone"}), "nothing was ever parked"
    for seed, fingerprint in enumerate((FINGERPRINT, "cd" * 32)):
        files = StateFiles(root, fingerprint)
        for session in ("gone", "stays", ""):
            head, payload = state(seed)
            files.write(StateHead(head.id, head.space, head.tokens, head.size, session), payload)
            kept += [head.id] if session != "gone" else []
        files.close()
    held = StateFiles(root, FINGERPRINT)
    assert not erase_sessions(root, {"gone", "unknown"}), "somebody has one of the folders"
    assert {each.session for each in held.scan()} == {"gone", "stays", ""}
    assert erase_sessions(root, {"gone"}, skip={FINGERPRINT})
    held.close()
    assert erase_sessions(root, {"gone"})
    assert sorted(each.stem for each in root.glob("*/*.kv")) == sorted(kept)
    (root / "no folder").touch()
    assert erase_sessions(root, {"gone"})


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("no folder")
    with pytest.raises(StorageError, match="cannot be deleted"):
        erase_sessions(tmp_path / "kv", {"gone"})
