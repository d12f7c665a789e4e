"""Hardware classes: coarse, stable, and the same for boxes that run the same code."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.fleet.hardware import hardware_class


@pytest.mark.parametrize(
    ("machine", "features", "board", "gpus", "expected"),
    [
        ("x86_64", {"AVX", "AVX2", "FMA"}, "", [], "x86-64-avx2"),
        ("x86_64", {"AVX2", "AVX-512", "AVX-512-VNNI"}, "", [], "x86-64-avx512-vnni"),
        ("x86_64", {"AVX2", "AVX-512", "AMX"}, "", ["NVIDIA H200"], "x86-64-amx-cuda"),
        ("AMD64", set(), "", [], "x86-64"),
        ("aarch64", {"NEON", "dotprod"}, "Raspberry Pi 5 Model B Rev 1.0", [], "arm64-dotprod"),
        ("aarch64", {"NEON"}, "NVIDIA Jetson Orin Nano Developer Kit", ["NVIDIA Jetson"], "jetson-orin-nano"),
        (
            "aarch64",
            {"NEON"},
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            [],
            "jetson-orin-nano",
        ),
        ("aarch64", {"NEON"}, "NVIDIA Jetson AGX Orin Developer Kit", [], "jetson-agx-orin"),
        ("riscv64", set(), "", [], "riscv64"),
        ("", set(), "", [], "unknown"),
    ],
)
def test_a_box_has_its_class(machine: str, features: set[str], board: str, gpus: list[str], expected: str) -> None:
    assert hardware_class(machine, features, board, gpus) == expected


@given(st.text(max_size=200), st.sets(st.text(max_size=9)), st.text(max_size=200), st.lists(st.text(max_size=9)))
def test_whatever_the_system_says_the_class_is_a_slug(
    machine: str, features: set[str], board: str, gpus: list[str]
) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", hardware_class(machine, features, board, gpus))
