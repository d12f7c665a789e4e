"""A version is tried in a process of its own, and whatever becomes of that one is a report."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from appliance.core.errors import NotFoundError
from appliance.core.releases import Criteria, GoldenInput
from appliance.core.wishes import SelfTestReport
from appliance.observe.resources import Memory
from appliance.serving import self_test
from appliance.serving.self_test import run_self_test
from tests import tiny_onnx
from tests.serving.conftest import Box, serving
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.anyio

PROMPT = "the quick brown fox"


async def tried(box: Box, full_name: str = "tiny:1", **criteria: object) -> SelfTestReport:
    async with asyncio.timeout(60):
        return await run_self_test(
            box.settings,
            box.registry.resolve(full_name),
            Criteria(**criteria),  # type: ignore[arg-type]
        )


async def written(box: Box, prompt: str) -> str:
    from appliance.core.types import GenerationRequest, SamplingParams
    from tests.serving.conftest import text_of

    async with serving(box) as floor:
        request = GenerationRequest("tiny:1", prompt, SamplingParams(temperature=0.0, max_tokens=8))
        return await text_of(await floor.text.generate(request))


async def test_a_sound_version_passes_with_its_figures(box: Box) -> None:
    expected = await written(box, PROMPT)
    golden = (GoldenInput(prompt=PROMPT, expected=expected, max_tokens=8),)
    report = await tried(box, golden=golden, least_tokens_per_second=1.0, most_memory=2**30)
    assert report.passed, report.detail
    assert report.code == ""
    assert report.tokens_per_second > 1
    assert 20 * 2**20 < report.memory < 2**30


async def test_the_memory_of_the_server_that_asks_is_not_counted(box: Box) -> None:
    held = b"x" * 2**30
    report = await tried(box, most_memory=2**29)
    assert report.passed, report.detail
    assert report.memory < 2**29 < len(held)


async def test_a_wrong_answer_fails_with_both_texts(box: Box) -> None:
    report = await tried(box, golden=(GoldenInput(prompt=PROMPT, expected="never this"),))
    assert (report.passed, report.code) == (False, "wrong_answer")
    assert "never this" in report.detail


async def test_a_slow_version_fails_with_both_figures(box: Box) -> None:
    report = await tried(box, least_tokens_per_second=1e9)
    assert (report.passed, report.code) == (False, "too_slow")
    assert report.tokens_per_second > 0


async def test_a_version_that_aborts_llama_cpp_takes_nobody_with_it(box: Box, tmp_path: Path) -> None:
    box.add_file("tiny", write_tiny_llama(tmp_path / "aborts.gguf", experts=4))
    report = await tried(box, "tiny:2")
    assert (report.passed, report.code) == (False, "crashed")
    assert "SIGABRT" in report.detail
    assert (await tried(box)).passed


async def test_a_damaged_version_is_not_loadable(box: Box) -> None:
    path = box.registry.resolve("tiny").files[0].path
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:50_000])
    report = await tried(box)
    assert (report.passed, report.code) == (False, "not_loadable")


async def test_a_version_that_takes_too_much_is_ended_by_its_memory(box: Box) -> None:
    report = await tried(box, most_memory=8 * 2**20)
    assert (report.passed, report.code) == (False, "out_of_memory")
    assert "might take 8" in report.detail


async def test_memory_that_cannot_be_had_is_refused_to_the_child_alone(box: Box) -> None:
    box.settings = replace(box.settings, context_cells=4_000_000)
    report = await tried(box, most_memory=300 * 2**20)
    assert (report.passed, report.code) == (False, "out_of_memory")


async def test_a_version_that_hangs_is_ended_by_the_clock(box: Box) -> None:
    own = psutil.Process()
    known = set(own.children())

    async def stop_the_child() -> None:
        while not (new := set(own.children()) - known):  # noqa: ASYNC110  (a process has no event)
            await asyncio.sleep(0.01)
        [child] = new
        os.kill(child.pid, signal.SIGSTOP)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stop_the_child())
        report = await tried(box, test_timeout_s=1.0)
    assert (report.passed, report.code) == (False, "timeout")
    assert not [each for each in own.children() if each.status() == psutil.STATUS_STOPPED]


async def test_a_version_killed_from_outside_ran_out_of_memory_as_far_as_anyone_can_tell(box: Box) -> None:
    own = psutil.Process()
    known = set(own.children())

    async def kill_the_child() -> None:
        while not (new := set(own.children()) - known):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.kill(new.pop().pid, signal.SIGKILL)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(kill_the_child())
        report = await tried(box)
    assert (report.passed, report.code) == (False, "out_of_memory")


async def test_an_embedder_is_held_against_its_vectors(box: Box) -> None:
    from appliance.core.types import EmbeddingRequest

    box.add_encoder("encoder")
    async with serving(box) as floor:
        [vector] = (await floor.embedding.embed(EmbeddingRequest("encoder", [PROMPT]))).vectors
    right = GoldenInput(prompt=PROMPT, outputs={"embedding": list(vector)})
    report = await tried(box, "encoder:1", golden=(right,))
    assert report.passed, report.detail
    assert report.tokens_per_second > 0
    wrong = GoldenInput(prompt=PROMPT, outputs={"embedding": [-each for each in vector]})
    report = await tried(box, "encoder:1", golden=(wrong,))
    assert (report.passed, report.code) == (False, "wrong_answer")
    shorter = GoldenInput(prompt=PROMPT, outputs={"embedding": list(vector)[:3]})
    assert (await tried(box, "encoder:1", golden=(shorter,))).code == "wrong_answer"


async def test_a_model_of_tensors_is_held_against_its_outputs(box: Box) -> None:
    box.add_tensors("table", tiny_onnx.tabular)
    signature = box.registry.resolve("table").signature
    assert signature is not None
    [given] = signature.inputs
    values = [[0.5] * int(given.shape[1] or 1)]
    async with serving(box) as floor:
        import numpy as np

        async with floor.tensor_models.lease(box.registry.resolve("table")) as model:
            outputs = await model.engine.infer({given.name: np.array(values, dtype=np.float32)})
    expected = {name: array.tolist() for name, array in outputs.items()}
    right = GoldenInput(tensors={given.name: values}, outputs=expected)
    report = await tried(box, "table:1", golden=(right,))
    assert report.passed, report.detail
    wrong = GoldenInput(tensors={given.name: values}, outputs={name: [[99.0]] for name in expected})
    assert (await tried(box, "table:1", golden=(wrong,))).code == "wrong_answer"
    unknown = GoldenInput(tensors={"nobody": values})
    assert (await tried(box, "table:1", golden=(unknown,))).code == "bad_golden_input"


async def test_a_version_that_would_fit_alone_but_not_beside_is_left_to_its_trial(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = box.registry.resolve("tiny").minimum_memory
    monkeypatch.setattr(self_test, "memory", lambda: Memory(total=2 * needs, available=needs // 2))
    report = await tried(box)
    assert (report.passed, report.code) == (True, "no_room")
    monkeypatch.setattr(self_test, "memory", lambda: Memory(total=needs // 2, available=needs // 2))
    report = await tried(box)
    assert (report.passed, report.code) == (False, "out_of_memory")


async def test_only_a_registered_version_is_tried(box: Box) -> None:
    async with serving(box) as floor:
        with pytest.raises(NotFoundError):
            await floor.versions.test("tiny:9", Criteria())
        assert (await floor.versions.test("tiny:1", Criteria())).passed
