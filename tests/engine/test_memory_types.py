"""Every kind of memory, on real llama.cpp: whatever was done to it, the logits are those of a cold run.

Full attention (llama), sliding windows (gemma2, gemma3), recurrent (mamba, rwkv7), a hybrid (jamba) and a hybrid with a
sliding window (lfm2). See `Layout.tolerance` for how near is near enough.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from appliance.core.types import SamplingParams
from appliance.engine.llama.cells import CellLedger
from appliance.engine.llama.context import State
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import short
from appliance.engine.llama.residents import Residents
from appliance.engine.llama.step import Sequence
from tests.engine.conftest import Answer, EngineUnderTest, collect, running
from tests.engine.native_memory import (
    BATCH_TOKENS,
    LAYOUTS,
    PLAIN,
    VOCABULARY,
    Laboratory,
    Layout,
    Subject,
    cells_of_type,
    laboratory,
    random_tokens,
)
from tests.tiny_gguf import SHORT_WINDOW, SLIDING_WINDOW, Architecture, write_tiny_llama

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
REWINDING: tuple[Architecture, ...] = ("llama", "gemma2", "gemma3")
WINDOWS: dict[Architecture, int] = {"gemma2": SLIDING_WINDOW, "gemma3": SHORT_WINDOW}

PAST, NEWS, OTHERS = random_tokens(1, 100), random_tokens(2, 20), random_tokens(3, 50)


@pytest.fixture(autouse=True)
def _without_the_words_of_llama_cpp(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="appliance.llama_cpp")


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    chosen: Layout = request.param
    return chosen


@pytest.fixture
def lab(tmp_path: Path, architecture: Architecture, layout: Layout) -> Iterator[Laboratory]:
    with laboratory(tmp_path, architecture, layout) as made:
        yield made


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
only_one_layout = pytest.mark.parametrize("layout", [PLAIN], ids=str)


# What is exact


@every_architecture
@pytest.mark.parametrize("piece", [1, 7, 33, BATCH_TOKENS])
def test_a_prompt_may_be_read_in_any_pieces_beside_any_strangers(lab: Laboratory, piece: int) -> None:
    subject = lab.new()
    subject.read(1, OTHERS)
    subject.read(0, PAST[:40], piece)
    logits = subject.read_together({0: PAST[40:], 1: NEWS, 2: OTHERS[:11], 3: PAST[:5]}, piece)
    for slot, row in logits.items():
        lab.check(row, subject.tokens[slot])


@every_architecture
def test_a_whole_past_goes_on_in_its_forks_and_in_itself(lab: Laboratory) -> None:
    subject = lab.new()
    subject.read(0, PAST)
    assert subject.fork(0, 1, len(PAST))
    assert subject.fork(1, 2, len(PAST))
    for slot, row in subject.read_together({2: NEWS, 0: NEWS[::-1]}).items():  # the source runs on beside its fork
        lab.check(row, subject.tokens[slot])
    assert subject.cut(0, 0)
    subject.read(3, OTHERS)
    lab.check_slot(subject, 1, NEWS[3:9])  # of a source that is gone, in cells that somebody else has written to
    assert subject.fork(2, 0, len(PAST) + len(NEWS))
    lab.check_slot(subject, 0, OTHERS[:5])
    lab.check_slot(subject, 2, OTHERS[5:9])


@pytest.mark.parametrize("architecture", REWINDING)
@pytest.mark.parametrize("length", [99, 98, 60, 10, 1])
def test_a_part_of_a_past_can_be_forked_and_cut_back_to(lab: Laboratory, length: int) -> None:
    subject = lab.new()
    subject.read(0, PAST)
    assert subject.fork(0, 1, length)
    lab.check_slot(subject, 1, NEWS)
    assert subject.cut(0, length)
    lab.check_slot(subject, 0, NEWS[::-1])


@every_architecture
@pytest.mark.parametrize("where", ["the same slot", "another slot", "a new context", "one with other cells and slots"])
def test_a_saved_state_goes_on_wherever_it_is_loaded(lab: Laboratory, where: str) -> None:
    subject = lab.new()
    subject.read(1, OTHERS)
    subject.read(0, PAST, piece=13)
    saved = subject.save(0)
    lab.check_slot(subject, 0, NEWS)  # who was saved goes on undisturbed
    subject.cut(0, 0)
    if where == "a new context":
        subject = lab.new()
    elif where == "one with other cells and slots":
        subject = lab.new(cells=300, slots=2)
    slot = 0 if where == "the same slot" else 1
    subject.cut(slot, 0)
    subject.read(1 - slot, OTHERS[::-1])
    assert subject.load(slot, saved)
    for each, row in subject.read_together({slot: NEWS, 1 - slot: NEWS[:3]}).items():
        lab.check(row, subject.tokens[each])
    assert subject.cut(slot, 0)
    assert subject.load(slot, saved)  # a state may be loaded any number of times
    lab.check_slot(subject, slot, NEWS[5:])


@every_architecture
def test_a_loaded_state_can_be_cut_back_as_far_as_it_says(lab: Laboratory, architecture: Architecture) -> None:
    subject = lab.new()
    subject.read(0, PAST)
    saved = subject.save(0)
    subject.cut(0, 0)
    expected = {"llama": 0, "gemma2": len(PAST) - 1, "gemma3": len(PAST) - 1}.get(architecture, len(PAST))
    for length in {max(expected, 1), len(PAST)}:
        assert subject.load(2, saved)
        assert subject.context.shortest(2) == expected
        if length < len(PAST):
            assert subject.fork(2, 1, length)
            lab.check_slot(subject, 1, NEWS)
            assert subject.cut(2, length)
        lab.check_slot(subject, 2, NEWS)
        subject.cut(1, 0)
        subject.cut(2, 0)


# What is not, and is refused


@pytest.mark.parametrize("architecture", ["mamba", "rwkv7", "jamba", "lfm2"])
@only_one_layout
@pytest.mark.parametrize("length", [99, 60, 1, 101])
def test_a_memory_that_cannot_go_back_says_so_and_hurts_nobody(lab: Laboratory, length: int) -> None:
    subject = lab.new()
    subject.read(0, PAST)
    subject.read(1, OTHERS)
    assert not subject.fork(0, 2, length)
    assert subject.context.held(2) == range(0)
    assert not subject.cut(0, length)
    assert subject.context.held(0) == range(0)
    lab.check_slot(subject, 1, NEWS)
    for slot in (0, 2):
        lab.check_slot(subject, slot, PAST[:30])  # what is empty can be used


@pytest.mark.parametrize("architecture", WINDOWS)
@only_one_layout
def test_a_window_that_was_overwritten_is_noticed(lab: Laboratory, architecture: Architecture) -> None:
    """Found with every cell of a full-size window free to be taken: llama.cpp overwrites what is outside the window."""
    subject = lab.new(cells=256)
    subject.read(0, PAST)
    subject.read(1, random_tokens(5, 60))
    subject.read(2, random_tokens(6, 60))
    subject.cut(1, 0)
    subject.read(1, random_tokens(7, 70))  # 26 cells are free; and yet it takes those of slot 2
    held, window = subject.context.held(2), WINDOWS[architecture]
    assert held.start > 0
    assert subject.context.shortest(2) == held.start + window - 1
    tokens = list(subject.tokens[2])
    for length in (1, held.start, held.start + window - 2):
        assert not subject.fork(2, 3, length)
    assert subject.tokens[3] == []
    assert subject.fork(2, 3, held.start + window - 1)
    lab.check_slot(subject, 3, NEWS)
    lab.check_slot(subject, 2, NEWS[:5])
    assert subject.tokens[2] == tokens + NEWS[:5]
    assert not subject.cut(2, 1)
    assert subject.context.held(2) == range(0)


@pytest.mark.parametrize("architecture", WINDOWS)
@only_one_layout
def test_llama_cpp_itself_would_go_on_from_a_lost_window_with_wrong_logits(
    lab: Laboratory, architecture: Architecture
) -> None:
    subject = lab.new()
    subject.read(0, PAST)
    saved = subject.save(0)
    subject.cut(0, 0)
    assert subject.load(0, saved)
    assert short.llama_memory_seq_rm(subject.context._memory, 0, 70, -1)  # "true": it was done
    del subject.tokens[0][70:]
    assert lab.difference(subject.read(0, NEWS), PAST[:70] + NEWS) > 10 * PLAIN.tolerance


# Random sequences of all of it


class MemoryMachine(RuleBasedStateMachine):
    """Random operations on few cells, as the scheduler would order them, and some that it never would."""

    lab: Laboratory
    slots = 4

    @initialize(cells=st.sampled_from([160, 256]))
    def start(self, cells: int) -> None:
        self.subject = self.lab.new(cells=cells, slots=self.slots)
        self.ledger = CellLedger(cells=cells, slots=self.slots)
        self.states: list[tuple[State, list[int]]] = []

    def lengths(self, slot: int) -> list[int]:
        """Return some lengths to cut a slot back to: those at the bounds, and between."""
        held = len(self.subject.tokens[slot])
        shortest = self.subject.context.shortest(slot)
        return sorted({max(shortest, 1), (shortest + held + 1) // 2, held - 1, held} & set(range(1, held + 1)))

    def used(self) -> list[int]:
        return [slot for slot, tokens in enumerate(self.subject.tokens) if tokens]

    def empty(self) -> list[int]:
        return [slot for slot, tokens in enumerate(self.subject.tokens) if not tokens]

    @rule(data=st.data(), piece=st.integers(1, BATCH_TOKENS), seed=st.integers(0, 3))
    def read(self, data: st.DataObject, piece: int, seed: int) -> None:
        slots = data.draw(st.lists(st.sampled_from(range(self.slots)), min_size=1, unique=True))
        news: dict[int, list[int]] = {}
        for slot in slots:
            length = min(data.draw(st.integers(1, 50)), self.ledger.free)
            if length:
                news[slot] = random_tokens(seed, length)
                self.ledger.extend(slot, length)
        for slot, row in self.subject.read_together(news, piece).items():
            self.lab.check(row, self.subject.tokens[slot])

    @precondition(lambda self: self.used())
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.used()))
        assert self.subject.cut(slot, 0)
        self.ledger.truncate(slot, 0)

    @precondition(lambda self: self.used())
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.used()))
        length = data.draw(st.sampled_from(self.lengths(slot)))
        exact = length >= self.subject.context.shortest(slot)
        assert self.subject.cut(slot, length) == exact
        self.ledger.truncate(slot, length if exact else 0)

    @precondition(lambda self: self.used() and self.empty())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source, target = data.draw(st.sampled_from(self.used())), data.draw(st.sampled_from(self.empty()))
        length = data.draw(st.sampled_from(self.lengths(source)))
        exact = length >= self.subject.context.shortest(source)
        assert self.subject.fork(source, target, length) == exact
        if exact:
            self.ledger.fork(source, target, length)

    @precondition(lambda self: self.used())
    @rule(data=st.data(), at_most=st.floats(0, 1))
    def ask_for_what_is_lost(self, data: st.DataObject, at_most: float) -> None:
        slot = data.draw(st.sampled_from(self.used()))
        length = int(at_most * (self.subject.context.shortest(slot) - 1))
        if length > 0:
            assert not self.subject.cut(slot, length)
            self.ledger.truncate(slot, 0)

    @precondition(lambda self: self.used())
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        self.states.append(self.subject.save(data.draw(st.sampled_from(self.used()))))

    @precondition(lambda self: self.states and self.empty())
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        slot, saved = data.draw(st.sampled_from(self.empty())), data.draw(st.sampled_from(self.states))
        fits = len(saved[1]) <= self.ledger.free
        if fits:
            assert self.subject.load(slot, saved)
            self.ledger.extend(slot, len(saved[1]))

    @precondition(lambda self: self.states and self.empty())
    @rule(data=st.data(), end=st.floats(0, 0.99))
    def load_what_is_cut_off(self, data: st.DataObject, end: float) -> None:
        state, tokens = data.draw(st.sampled_from(self.states))
        slot = data.draw(st.sampled_from(self.empty()))
        assert not self.subject.load(slot, (state[: int(end * len(state))].copy(), tokens))

    def teardown(self) -> None:
        """Whatever is left goes on as if nothing had happened."""
        for slot in self.used():
            if self.ledger.free:
                self.ledger.extend(slot, 1)
                self.lab.check_slot(self.subject, slot, [VOCABULARY.start])
        self.subject.context.close()


@pytest.mark.slow
@every_architecture
@only_one_layout
def test_any_sequence_of_operations_leaves_the_logits_of_a_cold_run(lab: Laboratory) -> None:
    machine = type("Machine", (MemoryMachine,), {"lab": lab})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


# Hostile states


@every_architecture
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_a_damaged_state_is_refused_and_hurts_nobody(lab: Laboratory) -> None:
    subject = lab.new()
    subject.read(1, OTHERS)
    subject.read(0, PAST[:40])
    state, tokens = subject.save(0)
    subject.cut(0, 0)
    damaged = {
        "nothing": state[:0],
        "no body": state[:8],
        "half": state[: len(state) // 2],
        "one byte less": state[:-1],
        "one byte more": np.append(state, np.uint8(0)),
        "noise": np.frombuffer(np.random.default_rng(4).bytes(len(state)), np.uint8),
        "zeros": np.zeros_like(state),
        "ones": np.full_like(state, 255),
    }
    for name, bad in damaged.items():
        assert not subject.load(0, (bad.copy(), tokens)), name
        assert subject.context.held(0) == range(0), name
    assert not subject.load(0, (state, tokens[:-1])), "another length"
    lab.check_slot(subject, 1, NEWS)
    assert subject.load(0, (state, tokens))
    lab.check_slot(subject, 0, NEWS)


@every_architecture
@only_one_layout
def test_no_flipped_bit_of_a_header_is_taken_for_a_longer_or_shorter_past(lab: Laboratory) -> None:
    subject = lab.new(cells=128)
    subject.read(1, OTHERS[:20])
    subject.read(0, PAST[:5])
    state, tokens = subject.save(0)
    subject.cut(0, 0)
    for bit in range(8 * 100):  # the magic number, counts, positions, and the first layer's type and width
        bad = state.copy()
        bad[bit // 8] ^= 1 << bit % 8
        if subject.load(0, (bad, tokens)):
            assert subject.context.held(0).stop == len(tokens)
            subject.cut(0, 0)
        assert subject.context.held(0) == range(0)
    subject.context.clear()  # accepted numbers that are none may lie about
    subject.tokens = [[] for _ in subject.tokens]
    lab.check_slot(subject, 0, PAST)


def geometries() -> Iterator[tuple[str, Architecture, Layout, dict[str, Any]]]:
    """Yield models and layouts, each with the name of what their states look like; those of one name fit each other."""
    for architecture in ARCHITECTURES:
        for layout in LAYOUTS[:3]:
            recurrent = architecture in ("mamba", "rwkv7")  # no setting changes the type of its numbers
            yield architecture if recurrent else f"{architecture.rstrip('23')} {layout}", architecture, layout, {}
    yield "wider", "llama", PLAIN, {"embedding": 64}
    yield "deeper", "llama", PLAIN, {"layers": 3}


def test_states_of_another_geometry_are_refused(tmp_path: Path) -> None:
    with ExitStack() as stack:
        subjects: list[tuple[str, Subject]] = []
        for number, (name, architecture, layout, options) in enumerate(geometries()):
            path = write_tiny_llama(tmp_path / f"{number}.gguf", architecture=architecture, **options)
            model = LlamaModel(path, gpu_layers=0)
            stack.callback(model.close)
            subject = Subject(model, layout)
            stack.callback(subject.context.close)
            subject.read(0, PAST)
            subject.read(1, OTHERS)
            subjects.append((name, subject))
        for name, subject in subjects:
            before, _ = subject.save(1)
            for other, theirs in subjects:
                assert subject.load(2, theirs.save(0)) == (name == other), (name, other)
                subject.cut(2, 0)
            assert np.array_equal(subject.save(1)[0], before)


@pytest.mark.parametrize("architecture", ["llama"])
@only_one_layout
def test_what_llama_cpp_does_not_notice_needs_a_checksum(lab: Laboratory, tmp_path: Path) -> None:
    """Why parked states carry one, and the model's digest: none of these is refused here."""
    subject = lab.new()
    subject.read(0, PAST)
    state, tokens = subject.save(0)
    subject.cut(0, 0)
    flipped, not_a_number = state.copy(), state.copy()
    flipped[len(state) // 2 : len(state) // 2 + 400] ^= 0x40
    not_a_number[-64:] = 255
    assert subject.load(0, (flipped, tokens))
    assert not lab.difference(subject.read(0, NEWS), PAST + NEWS) <= lab.layout.tolerance
    subject.cut(0, 0)
    with laboratory(tmp_path, "llama", PLAIN, seed=1) as other:
        theirs = other.new()
        theirs.read(0, PAST)
        assert subject.load(0, theirs.save(0))  # another model of the same geometry
    subject.cut(0, 0)
    subject.read(1, OTHERS)
    assert subject.load(0, (not_a_number, tokens))
    assert np.isnan(subject.read(1, NEWS)).all()  # attention reads the others' cells too, and masks them too late


# The whole engine

SAMPLING = SamplingParams(temperature=0, max_tokens=10, top_logprobs=2, ignore_eos=True)


def turns(family: int) -> list[str]:
    """Return prompts that share beginnings with each other and with those of other families."""
    system = "you are very welcome here, please answer the question in one sentence. "
    topic = ["the quick brown fox", "why does the dog sleep", "how are you today"][family]
    return [
        system + topic,
        system + topic + " and the user thinks about it, then says: " + "x y z "[: 2 * family + 2],
        system + topic + " and the user thinks about it, then asks the dog, the fox and the system again",
        system[:40] + topic,
        topic * (family + 1),
    ]


def near(answer: Answer, expected: Answer, tolerance: float) -> bool:
    """Return whether greedy answers are the same, up to the first choice between two tokens all but equally likely."""
    for ours, theirs in zip(answer.told, expected.told, strict=True):
        if abs(ours.logprob - theirs.logprob) > tolerance:
            return False
        if ours.token_id != theirs.token_id:
            return theirs.top[0][2] - theirs.top[1][2] < tolerance
    return True


async def converse(engine: EngineUnderTest, family: int) -> list[tuple[str, Answer]]:
    """Ask one prompt after the other, each after what was answered, with two choices and a request that is given up."""
    heard: list[tuple[str, Answer]] = []
    for number, text in enumerate(turns(family)):
        tokens = await engine.tokens(text)
        doomed = engine.engine.submit(tokens + [5] * number, SAMPLING) if number % 2 else None
        answers, _ = await engine.ask(text, SAMPLING, n=1 + number % 2)
        heard += [(text, answer) for answer in answers]
        again = text + answers[0].text + " and then?"
        generation = engine.engine.submit(await engine.tokens(again), SAMPLING)
        if doomed is not None:
            doomed.cancel()
        heard.append((again, (await collect(generation))[0]))
    return heard


async def check_answers(path: Path, heard: list[list[tuple[str, Answer]]]) -> None:
    """Compare answers with those of an engine that has nothing to reuse."""
    expected: dict[str, Answer] = {}
    async with running(path, sequences=1) as cold:
        for text in sorted({text for family in heard for text, _ in family}):
            await cold.ask("\0", SAMPLING)  # takes the only slot: nothing is left of the last one
            [expected[text]], usage = await cold.ask(text, SAMPLING)
            assert usage.cached_tokens == 0
    for family in heard:
        for text, answer in family:
            assert near(answer, expected[text], PLAIN.tolerance), text


@pytest.mark.anyio
@every_architecture
@pytest.mark.parametrize("parking_ram_bytes", [0, 2**22], ids=["resident", "parked"])
async def test_an_engine_that_reuses_whatever_it_can_answers_as_cold_ones_do(
    tmp_path: Path, architecture: Architecture, parking_ram_bytes: int
) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture)
    with cells_of_type(PLAIN.cell_type):
        async with running(path, cells=384, sequences=4, queue_size=16, parking_ram_bytes=parking_ram_bytes) as warm:
            heard = await asyncio.gather(*(converse(warm, family) for family in range(3)))
            await warm.until(lambda: warm.engine._worker.runner.scheduler.idle)
            warm.engine._worker.runner.scheduler.check_integrity()
        await check_answers(path, heard)


@pytest.mark.anyio
@pytest.mark.parametrize("architecture", WINDOWS)
async def test_a_past_that_is_lost_between_plan_and_deed_is_read_again(
    tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture)
    monkeypatch.setattr(Residents, "_reaches", lambda *_: True)  # the scheduler believes that nothing is ever lost
    with cells_of_type(PLAIN.cell_type):
        async with running(path, cells=384, sequences=4, queue_size=16) as warm:
            scheduler, lost = warm.engine._worker.runner.scheduler, []
            begin_again = scheduler.lost

            def note(sequence: Sequence) -> None:
                lost.append(sequence.id)
                begin_again(sequence)

            monkeypatch.setattr(scheduler, "lost", note)
            heard = await asyncio.gather(*(converse(warm, family) for family in range(3)))
            await warm.until(lambda: scheduler.idle)
            scheduler.check_integrity()
        assert lost
        await check_answers(path, heard)


@pytest.mark.anyio
@every_architecture
async def test_the_next_turn_after_a_restart_goes_on_from_the_whole_past(
    tmp_path: Path, architecture: Architecture
) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture)
    parking = {
        "parking_ram_bytes": 2**22,
        "parking_disk_bytes": 2**22,
        "parking_dir": tmp_path / "kv",
        "model_sha256": "00" * 32,
    }
    with cells_of_type(PLAIN.cell_type):
        async with running(path, **parking) as first:
            [answer] = await collect(first.engine.submit(PAST, SAMPLING))
        prompt = [*PAST, *answer.token_ids, *NEWS]
        async with running(path, **parking) as second:
            generation = second.engine.submit(prompt, SAMPLING)
            [resumed] = await collect(generation)
        async with running(path) as cold:
            [expected] = await collect(cold.engine.submit(prompt, SAMPLING))
    assert generation.usage.cached_tokens == len(PAST) + len(answer.token_ids) - 1
    assert near(resumed, expected, PLAIN.tolerance)
