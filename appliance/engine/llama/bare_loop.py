"""The engine's own limit: `llama_decode` and greedy sampling in a plain loop, without server, scheduler or text.

`python -m appliance.engine.llama.bare_loop` reads a `BareLoop` as JSON from standard input, runs it once and prints a
`BareLoopResult` as JSON. `appliance bench` compares the server's throughput with it: the same file, cells, threads,
sequences, prompts and number of tokens, and the same batch in every step: one token of each sequence.
"""

from __future__ import annotations

import logging
import sys
import time
from array import array
from collections.abc import Sequence as Row
from pathlib import Path
from typing import Literal

import msgspec

from appliance.core.errors import EngineError
from appliance.core.exits import leave_memory_to_the_system
from appliance.core.types import KvCacheType
from appliance.engine.llama.context import Decoded, LlamaContext
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama
from appliance.engine.llama.step import Run, Sequence


class BareLoop(msgspec.Struct, frozen=True, kw_only=True):
    """What to run; all as in the server's `EngineConfig`.

    Attributes:
        model: Path of the GGUF file.
        slots: Sequences that the context is made for, at least as many as there are prompts.
        prompts: Token ids, one list a sequence.
        tokens: How many tokens each sequence generates.
    """

    model: str
    cells: int
    slots: int
    batch_tokens: int
    threads: int
    gpu_layers: int
    flash_attention: Literal["auto", "on", "off"]
    kv_cache_type: KvCacheType
    prompts: list[list[int]]
    tokens: int


class BareLoopResult(msgspec.Struct, frozen=True, kw_only=True):
    """How fast it was.

    Attributes:
        tokens: Generated after each sequence's first one, over all sequences.
        seconds: From the first tokens, which came together, to the last ones.
        system: What llama.cpp says of its build and this CPU.
    """

    tokens: int
    seconds: float
    system: str


def run(job: BareLoop) -> BareLoopResult:
    """Load the model, read the prompts, and time the decoding.

    Raises:
        ModelFileError: llama.cpp refuses the file.
        EngineError: The memory does not suffice, or the prompts and answers do not fit the cells.
    """
    model = LlamaModel(Path(job.model), gpu_layers=job.gpu_layers)
    context = LlamaContext(
        model,
        cells=job.cells,
        slots=job.slots,
        batch_tokens=job.batch_tokens,
        threads=job.threads,
        flash_attention=job.flash_attention,
        kv_cache_type=job.kv_cache_type,
    )
    sequences = [Sequence(number, array("i", prompt)) for number, prompt in enumerate(job.prompts)]
    for slot, sequence in enumerate(sequences):
        sequence.slot = slot
        _read_all_but_last(context, sequence, job.batch_tokens)
    tokens = _step(context, sequences)  # the first tokens of all sequences, together
    started = time.perf_counter()
    for _ in range(job.tokens - 1):
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
        tokens = _step(context, sequences)
    seconds = time.perf_counter() - started
    result = BareLoopResult(
        tokens=(job.tokens - 1) * len(sequences),
        seconds=seconds,
        system=llama.llama_print_system_info().decode(errors="replace"),
    )
    context.close()
    model.close()
    return result


def _read_all_but_last(context: LlamaContext, sequence: Sequence, batch_tokens: int) -> None:
    end = len(sequence.tokens) - 1
    for start in range(0, end, batch_tokens):
        _decode(context, [Run(sequence, start, min(batch_tokens, end - start), sample=False)])


def _step(context: LlamaContext, sequences: Row[Sequence]) -> list[int]:
    """Evaluate the last token of every sequence and return the likeliest next ones."""
    _decode(context, [Run(each, len(each.tokens) - 1, 1, sample=True) for each in sequences])
    tokens: list[int] = context.logits().argmax(axis=1).tolist()
    return tokens


def _decode(context: LlamaContext, runs: Row[Run]) -> None:
    code = context.decode(runs)
    if code != Decoded.OK:
        raise EngineError(f"llama_decode answered {code} in the bare loop.", advice="Raise `context_cells`.")


def main() -> None:
    """Run the job on standard input."""
    leave_memory_to_the_system()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=BareLoop)
    sys.stdout.buffer.write(msgspec.json.encode(run(job)) + b"\n")


if __name__ == "__main__":
    main()
