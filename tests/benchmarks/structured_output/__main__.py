"""What `tests/benchmarks/structured` runs once everything is set up."""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.engine import LlamaEngine
from appliance.observe.metrics import Metrics
from tests.benchmarks.__main__ import _registered
from tests.benchmarks.structured_output.measure import Acceptance, Answers, Cost, accept, answer, cost

STREAMS = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests/benchmarks/structured", usage="see tests/benchmarks/structured --help")
    parser.add_argument("--schemas", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    logging.getLogger("appliance.llama_cpp").setLevel(logging.ERROR)
    options = parser.parse_args()
    options.data = Path(os.environ["APPLIANCE_TEST_MODEL_DATA"]).absolute()
    asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> None:
    with gzip.open(options.schemas, "rt", encoding="utf-8") as lines:
        schemas: list[dict[str, Any]] = [json.loads(line)["schema"] for line in lines]
    registered = _registered(options.data)
    config = EngineConfig(
        cells=8192,
        sequences=STREAMS,
        batch_tokens=512,
        threads=options.threads,
        gpu_layers=0,
        target_inter_token_latency_s=0.05,
        queue_size=10_000,
        speculation="off",  # it would guess more of one text than of another
    )
    path = registered.files[0].path
    engine = await LlamaEngine.load("structured:1", path, config, Metrics().for_model("structured:1"))
    try:
        if schemas:
            _print_acceptance(await accept(engine, schemas))
        if options.answers:
            step = max(1, len(schemas) // options.answers)
            _print_answers(await answer(engine, schemas[::step][: options.answers], tokens=options.tokens))
        for temperature in (0.0, 0.8):
            print_cost(await cost(engine, streams=STREAMS, runs=options.runs, temperature=temperature), temperature)
    finally:
        await engine.close()


def _print_acceptance(found: Acceptance) -> None:
    print(f"accepted: {found.accepted} of {found.of} schemas, {found.accepted / found.of:.1%}")
    print(f"compiled in {found.median_s * 1e3:.1f} ms (median), {found.most_s * 1e3:.0f} ms at most")
    for words, count in Counter(found.refusals).most_common():
        print(f"  refused {count:4}  {words}")


def _print_answers(found: Answers) -> None:
    print(f"answered: {found.finished} of {found.of} finished, {found.cut} cut by max_tokens, {found.failed} failed")
    print(f"valid: {found.finished - len(found.invalid)} of {found.finished} finished answers")
    print(f"whitespace: {found.blanks / max(1, found.characters):.1%} of the characters between values")
    for problem in found.invalid:
        print(f"  invalid  {problem}")


def print_cost(found: Cost, temperature: float) -> None:
    """Print what a grammar costs."""
    each = ", ".join(f"{ratio:.3f}" for ratio in found.ratios)
    print(
        f"cost at {STREAMS} streams, temperature {temperature:g}: {found.free:.1f} tokens a CPU second free, "
        f"{found.constrained:.1f} constrained, ratio {found.ratio:.3f} (of {each})",
        flush=True,
    )


if __name__ == "__main__":
    main()
