from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.registry.onnx_graph import find_graph, is_onnx
from tests.registry.onnx_models import write_encoder, write_encoder_folder
from tests.tiny_onnx import tabular


def test_of_several_graphs_one_must_be_named(tmp_path: Path) -> None:
    folder = write_encoder_folder(tmp_path / "encoder", graph="onnx/model.onnx")
    other = write_encoder(folder / "onnx" / "model_quantized.onnx")
    with pytest.raises(
        InvalidRequestError, match=r"holds 2 ONNX files \(onnx/model\.onnx, onnx/model_quantized\.onnx\)"
    ) as refused:
        find_graph(folder)
    assert "--file" in refused.value.advice
    assert find_graph(folder, "onnx/model_quantized.onnx") == other
    with pytest.raises(InvalidRequestError, match=r"has no ONNX file '\.\./x\.onnx'; it has: onnx/model\.onnx, ") as no:
        find_graph(folder, "../x.onnx")
    assert no.value.param == "file"


def test_of_many_graphs_a_few_are_named(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.onnx").touch()
    with pytest.raises(InvalidRequestError, match=r"holds 10 ONNX files \(0\.onnx, .*7\.onnx and 2 more\)"):
        find_graph(tmp_path)


def test_a_folder_without_a_graph_is_none(tmp_path: Path) -> None:
    assert not is_onnx(tmp_path)
    with pytest.raises(InvalidRequestError, match=r"holds 0 ONNX files \(none\)"):
        find_graph(tmp_path)


def test_a_folder_with_a_gguf_file_is_taken_for_that(tmp_path: Path) -> None:
    tabular(tmp_path / "model.onnx")
    assert is_onnx(tmp_path)
    (tmp_path / "model.GGUF").touch()
    assert not is_onnx(tmp_path)
    assert not is_onnx(tmp_path / "model.GGUF")


def test_a_file_has_no_files_in_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--file 'x' has no meaning"):
        find_graph(tabular(tmp_path / "model.onnx"), "x")
