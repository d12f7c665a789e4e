"""The KV memory of one model and the decoding of batches in it. Used by the worker's thread alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from appliance.core.errors import EngineError, SettingsError
from appliance.core.types import KvCacheType
from appliance.engine.llama.lora import LoraAdapter
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama, short
from appliance.engine.llama.step import Fork, Resume, Run, Truncate

PLAIN_ATTENTION_TOKENS = 128
"""Tokens that plain attention computes at once; its memory is this times cells times heads, and more is no faster."""

Logits = npt.NDArray[np.float32]
State = npt.NDArray[np.uint8]


class Decoded(IntEnum):
    """What `llama_decode` answered; anything else is a failure of this batch."""

    OK = 0
    NO_ROOM = 1


class LlamaContext:
    """Cells for all slots of one model, and one reusable batch.

    The batch is five NumPy arrays whose memory llama.cpp reads directly; filling 512 tokens takes microseconds where
    element-wise ctypes access takes a millisecond.

    Attributes:
        outputs: For each row of `logits()`, its token's place in the last batch.
        adapter: What batches are evaluated with, besides the model itself.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        cells: int,
        slots: int,
        batch_tokens: int,
        threads: int,
        flash_attention: Literal["auto", "on", "off"] = "auto",
        kv_cache_type: KvCacheType = "f16",
        draft_tokens: int = 0,
    ) -> None:
        """Reserve the memory.

        llama.cpp's flash attention on a CPU reads a prompt fast in pieces of 64 tokens or more, and below that at a
        fifth of the speed of plain attention; but pieces must be smaller for streams not to stall. So "auto" is on
        with a GPU only, and where the cells are quantised, which plain attention cannot read the values of.
        A step gives logits for one token of each slot and for `draft_tokens` more.

        Raises:
            EngineError: There is not enough of it.
            SettingsError: The model's cells cannot have this type.
        """
        _check_kv_cache_type(model, kv_cache_type, flash_attention)
        self._model = model
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = batch_tokens
        parameters.type_k = parameters.type_v = _KV_CACHE_TYPES[kv_cache_type]
        if uses_flash_attention(flash_attention, kv_cache_type):
            parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_AUTO
            parameters.n_ubatch = batch_tokens
        else:
            parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.n_ubatch = min(batch_tokens, PLAIN_ATTENTION_TOKENS)
        parameters.n_seq_max = slots
        parameters.n_outputs_max = slots + draft_tokens
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = True
        # As many cells for layers with a sliding window as for others. Of a model like Gemma 3 1B (22 of 26 layers look
        # back 512 tokens; 1 KiB a layer and token), 8,192 cells are 208 MiB then, and with windows alone some 130 for 8
        # sequences, and 208 for 16. But cells that sequences share are never given back to a window, so forks of a long
        # prefix would find no room, and nothing that lies before the window could be shared at all.
        parameters.swa_full = True
        parameters.no_perf = True
        with model.building:
            self._handle = llama.llama_init_from_model(model.handle, parameters)
        if not self._handle:
            raise EngineError(
                f"There is not enough memory for a context of {cells} KV cells of the type {kv_cache_type}.",
                advice="Lower `context_cells`, or choose a smaller model.",
                code="not_enough_memory",
            )
        self._memory = short.llama_get_memory(self._handle)
        # Without a GPU nothing is left to wait for, and letting go of the GIL once more would cost a turn.
        self._synchronize = (llama if llama.llama_supports_gpu_offload() else short).llama_synchronize
        self.outputs: list[int] = []
        self.adapter: LoraAdapter | None = None
        self._tokens = np.zeros(batch_tokens, dtype=np.int32)
        self._positions = np.zeros(batch_tokens, dtype=np.int32)
        self._slots = np.zeros(batch_tokens, dtype=np.int32)
        self._wanted = np.zeros(batch_tokens, dtype=np.int8)
        self._ones = np.ones(batch_tokens, dtype=np.int32)
        self._slot_pointers = self._slots.ctypes.data + np.arange(batch_tokens, dtype=np.uintp) * self._slots.itemsize
        self._batch = llama.llama_batch(
            0,
            _pointer(self._tokens, ctypes.c_int32),
            None,
            _pointer(self._positions, ctypes.c_int32),
            _pointer(self._ones, ctypes.c_int32),
            _pointer(self._slot_pointers, ctypes.POINTER(ctypes.c_int32)),
            _pointer(self._wanted, ctypes.c_int8),
        )

    def close(self) -> None:
        """Free the memory. Idempotent."""
        if self._handle:
            llama.llama_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> Any:
        """Return the native context, for the samplers."""
        return self._handle

    def set_threads(self, threads: int) -> None:
        """Compute the next batches with so many CPU threads."""
        short.llama_set_n_threads(self._handle, threads, threads)

    def apply(self, operation: Truncate | Fork) -> bool:
        """Carry out one of the scheduler's memory operations, exactly: the logits that follow are those of a cold run.

        Returns:
            False when the memory does not hold what that takes; the slot, of a fork the target, is empty then.
        """
        if isinstance(operation, Fork):
            exact = self._holds(operation.source, operation.length)
            if exact:
                short.llama_memory_seq_cp(self._memory, operation.source, operation.target, 0, operation.length)
            return exact
        exact = operation.length == 0 or self._holds(operation.slot, operation.length)
        short.llama_memory_seq_rm(self._memory, operation.slot, operation.length if exact else -1, -1)
        return exact

    def shortest(self, slot: int) -> int:
        """Return the fewest tokens, other than none, that a slot can be cut back to or forked at now.

        With a sliding window this rises whenever anyone writes; see `MemoryKind.shortest`.
        """
        return self._model.memory.shortest(self.held(slot))

    def _holds(self, slot: int, length: int) -> bool:
        """Return whether a slot has what it takes to go on after its first `length` tokens."""
        held = self.held(slot)
        return self._model.memory.shortest(held) <= length <= held.stop

    def use(self, adapter: LoraAdapter | None) -> None:
        """Evaluate the batches that follow with an adapter, or without one. The first of them takes longer."""
        if adapter is self.adapter:
            return
        if adapter is None:
            short.llama_set_adapters_lora(self._handle, None, 0, None)
        else:
            short.llama_set_adapters_lora(self._handle, adapter.pointers, 1, adapter.scales)
        self.adapter = adapter

    def clear(self, *, data: bool = False) -> None:
        """Forget everything in all slots.

        Args:
            data: Overwrite the cells too. Attention multiplies cells of others by 0, which an infinity survives.
        """
        short.llama_memory_clear(self._memory, data)

    def held(self, slot: int) -> range:
        """Return the positions whose state a slot holds in all layers.

        A sliding window may have lost its first ones, and a recurrent memory holds the last one only.
        """
        first = short.llama_memory_seq_pos_min(self._memory, slot)
        return range(max(first, 0), short.llama_memory_seq_pos_max(self._memory, slot) + 1)

    def state_bytes(self, slot: int) -> int:
        """Return how many bytes `save_state` writes."""
        return int(llama.llama_state_seq_get_size_ext(self._handle, slot, 0))

    def save_state(self, slot: int, into: State) -> None:
        """Copy all that the memory holds of a slot, of a sliding window the last one, to an array (state_bytes,).

        It can be loaded into any slot of any context of the same model, type of cells and kind of attention, however
        many cells and slots that has; see `appliance.engine.llama.memory` for what it is of use for then.

        Raises:
            EngineError: llama.cpp could not copy it.
        """
        size = len(into)
        written = llama.llama_state_seq_get_data_ext(self._handle, _pointer(into, ctypes.c_uint8), size, slot, 0)
        if written != size:
            raise EngineError(f"Only {written} of {size} bytes of a sequence's state could be copied.")

    def load_state(self, slot: int, state: State, length: int) -> bool:
        """Put the saved state of a sequence of `length` tokens into an empty slot.

        llama.cpp notices a state that is cut off, and one of other layers, widths, types of cells or kinds of
        attention. It does not notice changed numbers or positions, nor a state of another model of the same geometry.
        Numbers that are none would even spoil every other sequence, whose attention reads all cells, until they are
        overwritten. So a state that has been out of this process needs a checksum and the model's identity.

        Returns:
            False when llama.cpp refuses it or has no room, or it has another length; the slot is empty then.
        """
        read = llama.llama_state_seq_set_data_ext(self._handle, _pointer(state, ctypes.c_uint8), len(state), slot, 0)
        if read == len(state) and self.held(slot).stop == length:
            return True
        short.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False

    def resume(self, operation: Resume, state: State) -> bool:
        """Put the state of a parked sequence into a slot; returns as `load_state`."""
        length = len(operation.state.tokens)
        if not self.load_state(operation.slot, state, length):
            return False
        if operation.length < length and not self.apply(Truncate(operation.slot, operation.length)):
            return False
        if operation.source is not None:
            short.llama_memory_seq_rm(self._memory, operation.slot, 0, operation.shared)
            short.llama_memory_seq_cp(self._memory, operation.source, operation.slot, 0, operation.shared)
        return True

    def decode(self, runs: Sequence[Run]) -> int:
        """Evaluate a batch and wait for it; returns llama.cpp's code, see `Decoded`.

        Logits are kept for the last token of every run that samples, for its drafts, and with an adapter always for the
        last token of all; `outputs` then holds their places in the batch, in the order of the runs.
        """
        at = 0
        self.outputs = []
        for run in runs:
            assert run.sequence.slot is not None, "only running sequences are scheduled"
            end = at + run.count
            known = end - len(run.drafts)
            if run.count == 1:
                self._tokens[at] = run.sequence.tokens[run.start]
                self._positions[at] = run.start
            else:
                offset = run.start * self._tokens.itemsize
                self._tokens[at:known] = np.frombuffer(run.sequence.tokens, np.int32, known - at, offset)
                self._tokens[known:end] = run.drafts
                self._positions[at:end] = np.arange(run.start, run.start + run.count)
            self._slots[at:end] = run.sequence.slot
            self._wanted[at:end] = 0
            if run.sample:
                self._wanted[known - 1 : end] = 1
                self.outputs.extend(range(known - 1, end))
            at = end
        if self.adapter is not None and not self._wanted[at - 1]:
            self._wanted[at - 1] = 1  # whether it is a number tells of the whole batch
            self.outputs.append(at - 1)
        self._batch.n_tokens = at
        code: int = llama.llama_decode(self._handle, self._batch)
        self._synchronize(self._handle)
        return code

    def logits(self) -> Logits:
        """Return the logits of the last batch, shape (len(outputs), vocabulary), valid until the next one."""
        size = len(self.outputs) * self._model.vocabulary_size
        address = ctypes.cast(short.llama_get_logits(self._handle), ctypes.c_void_p).value
        assert address, "a decoded batch has logits"
        # numpy.ctypeslib makes a new array type each time, which costs more than the greedy choice itself.
        memory: Any = (ctypes.c_float * size).from_address(address)
        return np.frombuffer(memory, np.float32).reshape(len(self.outputs), self._model.vocabulary_size)


def uses_flash_attention(wanted: Literal["auto", "on", "off"], kv_cache_type: KvCacheType) -> bool:
    """Return whether a context that is made with these settings uses flash attention."""
    if wanted == "auto":
        return kv_cache_type != "f16" or bool(llama.llama_supports_gpu_offload())
    return wanted == "on"


_KV_CACHE_TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0, "q4_0": llama.GGML_TYPE_Q4_0}
_BLOCK_NUMBERS = 32
"""Numbers that share a scale in both quantised types; an attention head must be whole blocks long."""


def _check_kv_cache_type(model: LlamaModel, kind: KvCacheType, flash_attention: Literal["auto", "on", "off"]) -> None:
    if kind == "f16":
        return
    if flash_attention == "off":
        raise SettingsError(
            f"KV cells of the type {kind} need flash attention, which is off.",
            advice="Set flash_attention to auto or on, or kv_cache_type to f16.",
            param="kv_cache_type",
        )
    if any(length % _BLOCK_NUMBERS for length in model.head_lengths):
        raise SettingsError(
            f"KV cells of the type {kind} hold blocks of {_BLOCK_NUMBERS} numbers; the keys and values of an attention "
            f"head of this model have {' and '.join(map(str, model.head_lengths))}.",
            advice="Set kv_cache_type to f16 for this model.",
            param="kv_cache_type",
        )


def _pointer(values: npt.NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))
