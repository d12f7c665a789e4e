"""The tiny models load, tokenize and generate as a real one does, so that tests built on them mean something."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from tests.tiny_gguf import END_TOKEN_ID, SLIDING_WINDOW, Architecture, Quantisation, write_tiny_llama

Logits = npt.NDArray[np.float32]

TEXTS = ["Hello, the dog thinks.", "你好，世界。今天天气很好！", "👩‍👩‍👧 e\u0301 \u202e", "a\0b\r\n\t  c", ""]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(_level: int, _text: bytes, _user: ctypes.c_void_p) -> None:
    """Keep llama.cpp's log out of the tests' output."""


class _Runner:
    """One model and one sequence, driven by llama.cpp's own functions."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model
        stack.callback(llama_cpp.llama_model_free, self.model)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 512, 512, 32
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.swa_full = False
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context
        stack.callback(llama_cpp.llama_free, self.context)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 1))()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), False, parse_special)
        assert count >= 0
        return list(tokens[:count])

    def text_of(self, tokens: list[int]) -> bytes:
        pieces = []
        for token in tokens:
            buffer = ctypes.create_string_buffer(64)
            length = llama_cpp.llama_token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, True)
            pieces.append(buffer.raw[:length])
        return b"".join(pieces)

    def logits_after(self, tokens: list[int]) -> Logits:
        """Decode more tokens and return the next one's logits."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        count = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (count,)).copy()

    def cold_logits_after(self, tokens: list[int]) -> Logits:
        llama_cpp.llama_memory_clear(self.memory, True)
        return self.logits_after(tokens)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        logits, tokens = self.cold_logits_after(prompt), []
        for _ in range(count):
            tokens.append(int(logits.argmax()))
            logits = self.logits_after(tokens[-1:])
        return tokens


@contextmanager
def _running(path: Path) -> Iterator[_Runner]:
    with ExitStack() as stack:
        yield _Runner(path, stack)


@pytest.fixture(params=get_args(Architecture))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    name: Architecture = request.param
    return name


@pytest.fixture
def write(tmp_path: Path, architecture: Architecture) -> Callable[[int], Path]:
    return lambda seed: write_tiny_llama(tmp_path / f"{seed}.gguf", seed=seed, architecture=architecture)


def test_the_same_arguments_write_the_same_small_file(tmp_path: Path, architecture: Architecture) -> None:
    first = write_tiny_llama(tmp_path / "first.gguf", architecture=architecture).read_bytes()
    assert first == write_tiny_llama(tmp_path / "second.gguf", architecture=architecture).read_bytes()
    assert first != write_tiny_llama(tmp_path / "third.gguf", architecture=architecture, seed=1).read_bytes()
    assert len(first) < 500_000


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_tokenizing(tiny_model_path: Path, text: str) -> None:
    with _running(tiny_model_path) as runner:
        assert runner.text_of(runner.tokenize(text)) == text.encode()


def test_one_character_spans_several_tokens(tiny_model_path: Path) -> None:
    with _running(tiny_model_path) as runner:
        assert len(runner.tokenize("世")) == 3
        assert len(runner.tokenize("👍")) == 4
        assert len(runner.tokenize(" the dog")) == 2


def test_control_tokens_are_parsed_only_when_asked(tiny_model_path: Path) -> None:
    with _running(tiny_model_path) as runner:
        assert runner.tokenize("<|im_end|>", parse_special=True) == [END_TOKEN_ID]
        assert END_TOKEN_ID not in runner.tokenize("<|im_end|>")
        assert llama_cpp.llama_vocab_is_eog(runner.vocabulary, END_TOKEN_ID)


def test_greedy_decoding_repeats_and_does_not_end_by_itself(write: Callable[[int], Path]) -> None:
    path = write(0)
    with _running(path) as runner:
        first = runner.greedy(runner.tokenize("The quick brown fox"), 48)
        again = runner.greedy(runner.tokenize("The quick brown fox"), 48)
    with _running(path) as fresh:
        assert first == again == fresh.greedy(fresh.tokenize("The quick brown fox"), 48)
    assert END_TOKEN_ID not in first
    assert len(set(first)) > 10


def test_the_order_of_earlier_tokens_shows_in_the_logits(write: Callable[[int], Path]) -> None:
    with _running(write(0)) as runner:
        tokens = runner.tokenize("The quick brown fox jumps over it.")
        swapped = [*tokens[:3], tokens[4], tokens[3], *tokens[5:]]
        difference = np.abs(runner.cold_logits_after(tokens) - runner.cold_logits_after(swapped)).max()
        assert difference > 0.1


def test_a_sliding_window_model_forgets_its_start(tmp_path: Path) -> None:
    with _running(write_tiny_llama(tmp_path / "sliding.gguf", architecture="gemma2")) as runner:
        for token in runner.tokenize("x" * SLIDING_WINDOW * 12):
            runner.logits_after([token])
        assert llama_cpp.llama_memory_seq_pos_min(runner.memory, 0) > 0


def test_a_recurrent_model_cannot_drop_a_tail(tmp_path: Path) -> None:
    with _running(write_tiny_llama(tmp_path / "recurrent.gguf", architecture="mamba")) as runner:
        runner.logits_after(runner.tokenize("The quick brown fox"))
        assert llama_cpp.llama_model_is_recurrent(runner.model)
        assert not llama_cpp.llama_memory_seq_rm(runner.memory, 0, 2, -1)


def test_matrices_are_stored_as_asked(tmp_path: Path) -> None:
    sizes = {
        "f32": write_tiny_llama(tmp_path / "f32.gguf").stat().st_size,
        "f16": write_tiny_llama(tmp_path / "f16.gguf", quantisation="f16").stat().st_size,
        "q8_0": write_tiny_llama(tmp_path / "q8_0.gguf", quantisation="q8_0").stat().st_size,
    }
    assert sizes["f32"] > sizes["f16"] > sizes["q8_0"]


def test_every_quantisation_computes_nearly_the_same(tmp_path: Path) -> None:
    logits = {}
    kinds: tuple[Quantisation, ...] = ("f32", "f16", "q8_0")
    for kind in kinds:
        with _running(write_tiny_llama(tmp_path / f"{kind}.gguf", embedding=64, quantisation=kind)) as runner:
            logits[kind] = runner.logits_after(runner.tokenize("The quick brown fox"))
    spread = logits["f32"].std()
    assert np.abs(logits["f16"] - logits["f32"]).max() < 0.05 * spread
    assert np.abs(logits["q8_0"] - logits["f32"]).max() < 0.5 * spread
