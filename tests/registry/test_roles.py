from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ModelFileError
from appliance.registry.roles import MAX_FILES, check_path_role, check_path_roles


@pytest.mark.parametrize("role", ["tokenizer.json", "1_Pooling/config.json", "a/b/c/d", "词表.txt", "model.onnx_data"])
def test_paths_as_ecosystems_write_them_are_taken(role: str) -> None:
    assert check_path_role(role) == role


@pytest.mark.parametrize(
    "role",
    [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "a/../x",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "a/b/c/d/e",
        "x" * 256,
        "é" * 128,
        "model.onnx",
        "model.onnx/x",
        "\ud800",
        "a\u202eb",
    ],
)
def test_a_path_that_is_not_plainly_inside_the_folder_is_refused(role: str) -> None:
    with pytest.raises(ModelFileError):
        check_path_role(role)


@given(st.text(alphabet="a./\\\0 é", max_size=12))
def test_an_accepted_path_stays_in_the_folder(role: str) -> None:
    try:
        check_path_role(role)
    except ModelFileError:
        return
    folder = Path("/folder")
    assert (folder / role).resolve().is_relative_to(folder)
    assert str((folder / role).relative_to(folder)) == role


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["a", "a"], "twice"),
        (["a/b", "a"], "is a file, and the folder"),
        (["a", "a/b/c"], "is a file, and the folder"),
        ([f"f{number}" for number in range(MAX_FILES)], "65 files|64"),
        (["fine", "../x"], "no path"),
    ],
)
def test_files_that_cannot_lie_side_by_side_are_refused(roles: list[str], reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        check_path_roles(roles)


def test_files_in_folders_of_their_own_are_taken() -> None:
    check_path_roles(["config.json", "1_Pooling/config.json", "1_Pooling/more/x"])
