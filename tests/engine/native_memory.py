"""Real contexts on tiny models, with what each slot should hold, and the logits of a cold run to compare with."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from appliance.engine.llama.context import LlamaContext, Logits, State
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama
from appliance.engine.llama.step import Fork, Run, Sequence, Truncate
from tests.tiny_gguf import Architecture, write_tiny_llama

BATCH_TOKENS = 64
VOCABULARY = range(3, 320)
"""Token ids of the tiny models that are no control tokens."""


@dataclass(frozen=True)
class Layout:
    """How the cells lie in memory.

    Attributes:
        tolerance: What a logit may differ by from a cold run's. Numbers are added up in another order when a batch is
            composed otherwise; where cells are rounded to fewer bits, that makes some of them round the other way.
    """

    name: str
    flash_attention: Literal["on", "off"]
    cell_type: int
    tolerance: float

    def __str__(self) -> str:
        return self.name


PLAIN = Layout("f32", "off", llama.GGML_TYPE_F32, 2e-3)
"""Where a wrong past shows best: what remains comes of Gemma's GELU, which llama.cpp looks up in a table of f16."""
LAYOUTS = (
    PLAIN,
    Layout("f16", "off", llama.GGML_TYPE_F16, 5e-3),
    Layout("f16-flash", "on", llama.GGML_TYPE_F16, 0.1),
    Layout("q8_0-flash", "on", llama.GGML_TYPE_Q8_0, 0.1),
)


@contextmanager
def cells_of_type(cell_type: int) -> Iterator[None]:
    """Have every new context use this type, also those that are no setting."""
    start = llama.llama_init_from_model

    def start_with_type(model: Any, parameters: Any) -> Any:
        parameters.type_k = parameters.type_v = cell_type
        return start(model, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "llama_init_from_model", start_with_type)
        yield


class Subject:
    """One context, and the tokens that each slot holds."""

    def __init__(self, model: LlamaModel, layout: Layout, *, cells: int = 512, slots: int = 4) -> None:
        with cells_of_type(layout.cell_type):
            self.context = LlamaContext(
                model,
                cells=cells,
                slots=slots,
                batch_tokens=BATCH_TOKENS,
                threads=1,
                flash_attention=layout.flash_attention,
            )
        self.tokens: list[list[int]] = [[] for _ in range(slots)]

    def read(self, slot: int, tokens: list[int], piece: int = BATCH_TOKENS) -> Logits:
        """Append tokens to a slot, in pieces, and return the logits after the last."""
        return self.read_together({slot: tokens}, piece)[slot]

    def read_together(self, news: Mapping[int, list[int]], piece: int = BATCH_TOKENS) -> dict[int, Logits]:
        """Append tokens to several slots, in common batches, and return the logits after the last of each."""
        left = {slot: list(tokens) for slot, tokens in news.items() if tokens}
        logits: dict[int, Logits] = {}
        while left:
            share = min(piece, max(1, BATCH_TOKENS // len(left)))
            runs = []
            for number, (slot, tokens) in enumerate(left.items()):
                start = len(self.tokens[slot])
                self.tokens[slot] += tokens[:share]
                del tokens[:share]
                sequence = Sequence(number, array("i", self.tokens[slot]))
                sequence.slot = slot
                runs.append(Run(sequence, start, len(self.tokens[slot]) - start, sample=not tokens))
            assert self.context.decode(runs) == 0
            ends = [slot for slot, tokens in left.items() if not tokens]
            if ends:
                logits |= dict(zip(ends, self.context.logits().copy(), strict=True))
            left = {slot: tokens for slot, tokens in left.items() if tokens}
        return logits

    def cut(self, slot: int, length: int) -> bool:
        done = self.context.apply(Truncate(slot, length))
        del self.tokens[slot][length if done else 0 :]
        return done

    def fork(self, source: int, target: int, length: int) -> bool:
        done = self.context.apply(Fork(source, target, length))
        self.tokens[target] = self.tokens[source][:length] if done else []
        return done

    def save(self, slot: int) -> tuple[State, list[int]]:
        state = np.empty(self.context.state_bytes(slot), np.uint8)
        self.context.save_state(slot, state)
        return state, list(self.tokens[slot])

    def load(self, slot: int, saved: tuple[State, list[int]]) -> bool:
        state, tokens = saved
        done = self.context.load_state(slot, state, len(tokens))
        self.tokens[slot] = list(tokens) if done else []
        return done


class Laboratory:
    """One model: contexts of it, and what a cold run answers."""

    def __init__(self, model: LlamaModel, layout: Layout) -> None:
        self.model = model
        self.layout = layout
        self.new: Callable[..., Subject] = partial(Subject, model, layout)
        self._cold = self.new(slots=1)
        self._answers: dict[tuple[int, ...], Logits] = {}

    def cold(self, tokens: list[int]) -> Logits:
        """Return the logits after these tokens, read by themselves in an empty context."""
        key = tuple(tokens)
        if key not in self._answers:
            self._cold.context.clear()
            self._cold.tokens[0] = []
            self._answers[key] = self._cold.read(0, tokens)
        return self._answers[key]

    def difference(self, logits: Logits, tokens: list[int]) -> float:
        """Return by how much logits differ at most from those of a cold run."""
        return float(np.abs(logits - self.cold(tokens)).max())

    def check(self, logits: Logits, tokens: list[int]) -> None:
        difference = self.difference(logits, tokens)
        assert difference <= self.layout.tolerance, f"{difference:.2g} from a cold run after {len(tokens)} tokens"

    def check_slot(self, subject: Subject, slot: int, news: list[int]) -> None:
        """Let a slot read on, and compare."""
        logits = subject.read(slot, news)
        self.check(logits, subject.tokens[slot])


@contextmanager
def laboratory(folder: Path, architecture: Architecture, layout: Layout, *, seed: int = 0) -> Iterator[Laboratory]:
    """Write and load a model; its contexts are closed at the end."""
    embedding = 64 if layout.cell_type == llama.GGML_TYPE_Q8_0 else 32  # heads are whole blocks of 32 numbers
    path = write_tiny_llama(
        folder / f"{architecture}-{embedding}-{seed}.gguf", architecture=architecture, embedding=embedding, seed=seed
    )
    model = LlamaModel(path, gpu_layers=0)
    made: list[Subject] = []
    lab = Laboratory(model, layout)
    made.append(lab._cold)
    new = lab.new

    def remember(**options: int) -> Subject:
        made.append(new(**options))
        return made[-1]

    lab.new = remember
    try:
        yield lab
    finally:
        for each in made:
            each.context.close()
        model.close()


def random_tokens(seed: int, count: int) -> list[int]:
    """Return tokens that no other seed begins with."""
    numbers = np.random.default_rng(seed).integers(VOCABULARY.start, VOCABULARY.stop, count)
    return [int(each) for each in numbers]
