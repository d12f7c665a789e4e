"""Which execution providers are asked for, and with what."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from appliance.core.errors import SettingsError
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.providers import CPU, CUDA, NAMES, TENSORRT, choose, options

JETSON = ("CPUExecutionProvider", "TensorrtExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider")


@pytest.mark.parametrize(
    ("wish", "available", "chosen"),
    [
        ("auto", JETSON, (TENSORRT, CUDA, CPU)),
        (" AUTO ", [CPU, CUDA], (CUDA, CPU)),
        ("auto", ["AzureExecutionProvider", CPU], (CPU,)),
        ("auto", [], (CPU,)),
        ("cuda,tensorrt", JETSON, (CUDA, TENSORRT, CPU)),
        ("CPU", JETSON, (CPU,)),
        ("cpu, cuda", JETSON, (CPU, CUDA)),
    ],
)
def test_providers_come_in_order_and_the_cpu_is_always_there(
    wish: str, available: list[str], chosen: tuple[str, ...]
) -> None:
    assert choose(wish, available) == chosen


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ("openvino", "names 'openvino'; there are tensorrt, cuda, cpu"),
        ("auto,cpu", "names 'auto'"),
        ("", "names ''"),
        ("cpu,", "names ''"),
        ("cuda,CUDA", "twice: cuda, cuda"),
        ("x" * 1000, "names 'xxx"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(wish: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        choose(wish, JETSON)
    assert caught.value.param == "execution_providers"
    assert len(caught.value.message) < 200


def test_a_provider_that_is_wished_and_not_there_is_an_error() -> None:
    with pytest.raises(SettingsError, match="asks for cuda, which the installed onnxruntime does not have"):
        choose("cuda,cpu", [CPU])


@given(st.sets(st.sampled_from(list(NAMES.values()))), st.lists(st.sampled_from(list(NAMES)), min_size=1))
def test_nothing_is_asked_for_that_is_not_there(available: set[str], wish: list[str]) -> None:
    for text in ("auto", ",".join(wish)):
        try:
            chosen = choose(text, sorted(available))
        except SettingsError:
            continue
        assert set(chosen) <= available | {CPU}
        assert CPU in chosen
        assert len(set(chosen)) == len(chosen)


def test_the_cpu_takes_no_options() -> None:
    assert options(CPU, SessionConfig()) == {}


@pytest.mark.parametrize(("limit", "told"), [(0, None), (2**30, str(2**30))])
def test_cuda_grows_by_what_is_needed_up_to_its_limit(limit: int, told: str | None) -> None:
    given = options(CUDA, SessionConfig(gpu_memory_bytes=limit))
    assert given["arena_extend_strategy"] == "kSameAsRequested"
    assert given.get("gpu_mem_limit") == told
    assert options(TENSORRT, SessionConfig(gpu_memory_bytes=limit)).get("trt_max_workspace_size") == told


@pytest.mark.parametrize(("precision", "fp16", "int8"), [("fp32", "0", "0"), ("fp16", "1", "0"), ("int8", "1", "1")])
def test_tensorrt_calculates_as_exactly_as_is_wished(precision: str, fp16: str, int8: str) -> None:
    given = options(TENSORRT, SessionConfig(precision=precision))  # type: ignore[arg-type]
    assert (given["trt_fp16_enable"], given["trt_int8_enable"]) == (fp16, int8)
    assert "trt_engine_cache_enable" not in given


def test_tensorrt_keeps_what_it_has_built() -> None:
    given = options(TENSORRT, SessionConfig(engine_cache_dir=Path("cache")))
    assert given["trt_engine_cache_enable"] == given["trt_timing_cache_enable"] == "1"
    assert given["trt_engine_cache_path"] == given["trt_timing_cache_path"] == "cache"
