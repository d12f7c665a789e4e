from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.errors import EngineError
from appliance.engine.llama.bare_loop import BareLoop, run


def job(path: Path, *, cells: int = 512, prompts: list[list[int]] | None = None) -> BareLoop:
    return BareLoop(
        model=str(path),
        cells=cells,
        slots=8,
        batch_tokens=32,
        threads=1,
        gpu_layers=0,
        flash_attention="auto",
        kv_cache_type="f16",
        prompts=[[5, 6, 7], [8, *range(9, 60)]] if prompts is None else prompts,
        tokens=10,
    )


def test_every_sequence_generates_its_tokens_after_the_first(tiny_model_path: Path) -> None:
    result = run(job(tiny_model_path))
    assert result.tokens == 2 * 9
    assert result.seconds > 0
    assert result.system


def test_prompts_that_do_not_fit_the_cells_are_told(tiny_model_path: Path) -> None:
    with pytest.raises(EngineError, match="llama_decode answered 1"):
        run(job(tiny_model_path, cells=256, prompts=[[5] * 200, [6] * 200]))
