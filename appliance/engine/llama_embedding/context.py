"""Batches of inputs become vectors, in a llama.cpp context of their own. Used by the worker's thread alone.

What llama.cpp asks of a batch depends on the model:

- An encoder, or any model whose attention looks ahead, must have each input whole in one micro-batch; llama.cpp pools.
- A causal decoder may be read in pieces, as a chat prompt is, and is pooled here. That matters because a llama.cpp
  context with embeddings on computes the logits of every token beside them: pieces bound their memory, and where only
  the last state counts, the others are read with embeddings off, which leaves their logits out.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from appliance.core.errors import EngineError
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama, short
from appliance.engine.llama_embedding.pooling import Pooling, pooling_of

PIECE_TOKENS = 128
"""Tokens of a causal decoder that are evaluated at once."""
OUTPUT_BYTES = 128 * 2**20
"""Most memory for the logits that llama.cpp reserves beside a whole batch's states, unless one input needs more."""
LEAST_BATCH_TOKENS = 64
WHOLE_TOKENS = 256
"""llama.cpp aborts the process when a pooled micro-batch is not a multiple of the inputs that it is made for."""

Vectors = npt.NDArray[np.float32]
_Numbers = npt.NDArray[np.int32]


class LlamaEmbeddingContext:
    """The memory to evaluate one batch of inputs, which it forgets afterwards.

    Attributes:
        dimensions: Numbers of a vector.
        longest_input: Most tokens of one input.
        batch_tokens: Tokens at which a batch should close; one input may have more.
        pooling: How states become a vector.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        longest_input: int,
        batch_tokens: int,
        inputs: int,
        threads: int,
        flash_attention: Literal["auto", "on", "off"] = "auto",
        on_piece: Callable[[], None] = lambda: None,
    ) -> None:
        """Reserve the memory for batches of so many tokens and inputs; `on_piece` is called before each evaluation.

        Raises:
            ModelFileError: The model's states make no embedding.
            EngineError: There is not enough memory.
        """
        self._model = model
        declared = model.metadata("{arch}.pooling_type")
        self.pooling = pooling_of(declared)
        self.dimensions: int = short.llama_model_n_embd_out(model.handle)
        self.longest_input = min(longest_input, model.training_context)
        self.batch_tokens = min(batch_tokens, max(LEAST_BATCH_TOKENS, OUTPUT_BYTES // (4 * model.vocabulary_size)))
        self._encodes = short.llama_model_has_encoder(model.handle)
        self._inputs = inputs
        self._on_piece = on_piece
        self._capacity = -(-max(self.longest_input, self.batch_tokens) // WHOLE_TOKENS) * WHOLE_TOKENS
        self._flash_attention = flash_attention
        self._pools_by_itself = declared is not None
        self._whole = self._encodes or model.metadata("{arch}.attention.causal") == "false"
        self._handle = self._new_handle(threads)
        self._memory = short.llama_get_memory(self._handle)
        if not self._memory and not self._whole:  # an encoder whose file does not say that it looks ahead
            self.close()
            self._whole = True
            self._handle = self._new_handle(threads)
        self._batch = _Batch(self._capacity)

    def close(self) -> None:
        """Free the memory. Idempotent."""
        if self._handle:
            llama.llama_free(self._handle)
            self._handle = None

    def embed(self, inputs: Sequence[array[int]]) -> tuple[int, Vectors]:
        """Evaluate a batch and forget it.

        Returns:
            llama.cpp's code, 0 if all went well, and the vectors of length 1, shape (inputs, dimensions); a vector that
            cannot be had is not a number throughout.
        """
        lengths = np.array([len(each) for each in inputs])
        tokens = np.concatenate([np.frombuffer(each, np.int32) for each in inputs])
        positions = np.concatenate([np.arange(each, dtype=np.int32) for each in lengths])
        owners = np.repeat(np.arange(len(inputs), dtype=np.int32), lengths)
        try:
            if self._whole:
                code, states = self._pooled_by_llama(tokens, positions, owners)
            elif self.pooling == Pooling.LAST:
                code, states = self._last(tokens, positions, owners)
            else:
                code, states = self._mean(tokens, positions, owners)
        finally:
            if self._memory:
                short.llama_memory_clear(self._memory, False)
        return code, _normalised(states)

    def _pooled_by_llama(self, tokens: _Numbers, positions: _Numbers, owners: _Numbers) -> tuple[int, Vectors]:
        states = np.full((int(owners[-1]) + 1, self.dimensions), np.nan, np.float32)
        code = self._evaluate(tokens, positions, owners)
        if code == 0:
            for row in range(len(states)):
                states[row] = self._read(short.llama_get_embeddings_seq(self._handle, row), 1)[0]
        return code, states

    def _mean(self, tokens: _Numbers, positions: _Numbers, owners: _Numbers) -> tuple[int, Vectors]:
        sums = np.zeros((int(owners[-1]) + 1, self.dimensions))
        short.llama_set_embeddings(self._handle, True)
        for start in range(0, len(tokens), PIECE_TOKENS):
            piece = slice(start, start + PIECE_TOKENS)
            code = self._evaluate(tokens[piece], positions[piece], owners[piece])
            if code:
                return code, np.full(sums.shape, np.nan, np.float32)
            np.add.at(sums, owners[piece], self._read(short.llama_get_embeddings(self._handle), len(tokens[piece])))
        return 0, (sums / np.bincount(owners)[:, np.newaxis]).astype(np.float32)

    def _last(self, tokens: _Numbers, positions: _Numbers, owners: _Numbers) -> tuple[int, Vectors]:
        ends = np.append(owners[1:] != owners[:-1], True)
        count = int(ends.sum())
        short.llama_set_embeddings(self._handle, False)
        rest = np.flatnonzero(~ends)
        for start in range(0, len(rest), PIECE_TOKENS):
            piece = rest[start : start + PIECE_TOKENS]
            code = self._evaluate(tokens[piece], positions[piece], owners[piece], wanted=False)
            if code:
                return code, np.full((count, self.dimensions), np.nan, np.float32)
        short.llama_set_embeddings(self._handle, True)
        code = self._evaluate(tokens[ends], positions[ends], owners[ends])
        if code:
            return code, np.full((count, self.dimensions), np.nan, np.float32)
        return 0, self._read(short.llama_get_embeddings(self._handle), count)

    def _evaluate(self, tokens: _Numbers, positions: _Numbers, owners: _Numbers, *, wanted: bool = True) -> int:
        self._on_piece()
        batch = self._batch.filled(tokens, positions, owners, wanted=wanted)
        code: int = (llama.llama_encode if self._encodes else llama.llama_decode)(self._handle, batch)
        llama.llama_synchronize(self._handle)
        return code

    def _read(self, pointer: Any, rows: int) -> Vectors:
        """Return a copy of states that llama.cpp holds until the next batch; of none, what is not a number."""
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if not address:
            return np.full((rows, self.dimensions), np.nan, np.float32)
        memory: Any = (ctypes.c_float * (rows * self.dimensions)).from_address(address)
        return np.frombuffer(memory, np.float32).reshape(rows, self.dimensions).copy()

    def _new_handle(self, threads: int) -> Any:
        parameters = llama.llama_context_default_params()
        parameters.embeddings = True
        parameters.n_ctx = self._capacity
        if self._whole:
            parameters.n_batch = parameters.n_ubatch = self._capacity
            parameters.pooling_type = self.pooling
        else:
            parameters.n_batch = parameters.n_ubatch = PIECE_TOKENS
            if self._pools_by_itself:
                parameters.pooling_type = Pooling.NONE
            if self.pooling == Pooling.LAST:
                parameters.n_outputs_max = self._inputs
        parameters.n_seq_max = self._inputs
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = True
        parameters.swa_full = True
        parameters.no_perf = True
        if self._flash_attention == "off":
            parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with self._model.building:
            handle = llama.llama_init_from_model(self._model.handle, parameters)
        if not handle:
            raise EngineError(
                f"There is not enough memory to embed inputs of {self.longest_input} tokens.",
                advice="Lower `max_embedding_tokens`, or choose a smaller model.",
                code="not_enough_memory",
            )
        return handle


class _Batch:
    """A batch whose arrays llama.cpp reads directly; see `LlamaContext`."""

    def __init__(self, capacity: int) -> None:
        self._tokens, self._positions, self._owners = (np.zeros(capacity, np.int32) for _ in range(3))
        self._ones, self._wanted = np.ones(capacity, np.int32), np.zeros(capacity, np.int8)
        self._pointers = self._owners.ctypes.data + np.arange(capacity, dtype=np.uintp) * self._owners.itemsize
        self._native = llama.llama_batch(
            0,
            _pointer(self._tokens, ctypes.c_int32),
            None,
            _pointer(self._positions, ctypes.c_int32),
            _pointer(self._ones, ctypes.c_int32),
            _pointer(self._pointers, ctypes.POINTER(ctypes.c_int32)),
            _pointer(self._wanted, ctypes.c_int8),
        )

    def filled(self, tokens: _Numbers, positions: _Numbers, owners: _Numbers, *, wanted: bool) -> Any:
        count = len(tokens)
        self._tokens[:count], self._positions[:count], self._owners[:count] = tokens, positions, owners
        self._wanted[:count] = wanted
        self._native.n_tokens = count
        return self._native


def _normalised(states: Vectors) -> Vectors:
    with np.errstate(all="ignore"):
        vectors: Vectors = states / np.linalg.norm(states, axis=1, keepdims=True)
    vectors[~np.isfinite(vectors).all(axis=1)] = np.nan
    return vectors


def _pointer(values: npt.NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))
