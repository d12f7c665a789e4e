from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.errors import InvalidRequestError, ModelFileError, NotFoundError
from appliance.registry.onnx_folder import find_companions, find_external, find_graph, is_onnx, read_model
from appliance.registry.onnx_header import read_onnx
from tests.registry.onnx_models import write_encoder, write_encoder_folder
from tests.tiny_onnx import external, tabular

TAKEN = {
    "tokenizer.json",
    "config.json",
    "1_Pooling/config.json",
    "modules.json",
    "sentence_bert_config.json",
}


def test_a_sentence_transformers_folder_is_one_model(tmp_path: Path) -> None:
    folder = write_encoder_folder(tmp_path / "encoder")
    graph = find_graph(folder)
    assert is_onnx(folder)
    assert graph == folder / "model.onnx"
    files = find_companions(folder, graph)
    assert files.keys() == TAKEN
    assert read_model(graph, files).purpose.task == "embedding"


def test_a_graph_in_the_folder_onnx_has_its_companions_above_or_beside(tmp_path: Path) -> None:
    folder = write_encoder_folder(tmp_path / "encoder", graph="onnx/model.onnx")
    graph = find_graph(folder)
    assert graph == folder / "onnx" / "model.onnx"
    (folder / "config.json").rename(folder / "onnx" / "config.json")
    files = find_companions(folder, graph)
    assert files.keys() == TAKEN
    assert files["config.json"] == folder / "onnx" / "config.json"


def test_a_file_that_is_named_itself_comes_alone(tmp_path: Path) -> None:
    folder = write_encoder_folder(tmp_path / "encoder")
    path = folder / "model.onnx"
    assert is_onnx(path)
    assert (find_graph(path), find_companions(path, path)) == (path, {})


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


def test_data_files_lie_beside_the_graph(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    graph = external(folder / "model.onnx", "data/weights.bin")
    files = find_external(graph, read_onnx(graph))
    assert files == {"data/weights.bin": folder / "data" / "weights.bin"}
    assert read_model(graph, files).header.signature.batched


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    graph = external(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink()
    assert find_external(graph, read_onnx(graph)) == {}
    with pytest.raises(ModelFileError, match=r"'weights\.bin', which is missing"):
        read_model(graph, {})


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    graph = external(folder / "model.onnx")
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(target)
    with pytest.raises(ModelFileError, match="is a link out of its folder"):
        find_external(graph, read_onnx(graph))


def test_a_folder_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights.bin").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    graph = external(folder / "model.onnx", "data/weights.bin")
    (folder / "data" / "weights.bin").unlink()
    (folder / "data").rmdir()
    (folder / "data").symlink_to("../elsewhere")
    with pytest.raises(ModelFileError, match="is a link out of its folder"):
        find_external(graph, read_onnx(graph))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*"])
def test_a_data_file_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    with pytest.raises(ModelFileError, match="no plain path inside its folder"):
        read_model(external(tmp_path / "model.onnx", location), {})


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_model(find_graph(tmp_path / "none.onnx"), {})
