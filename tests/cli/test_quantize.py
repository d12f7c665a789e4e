"""`appliance models quantize` as a person or a script calls it: what comes out, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests import tiny_encoders, tiny_onnx
from tests.engine.test_quantize import IMAGE, convolution, perceptron
from tests.registry.processes import run, start
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.slow


class Box:
    """A data folder, worked on by the command line."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"

    def call(self, *arguments: str, code: int = 0) -> str:
        """Run a verb of `appliance models`, check its exit code and return what it printed."""
        done = run("models", *arguments, "--data", str(self.data))
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.call(*arguments, "--json"))

    def error(self, *arguments: str, code: int) -> Any:
        return json.loads(self.call(*arguments, "--json", code=code).strip().splitlines()[-1])["error"]

    @property
    def models(self) -> list[str]:
        return [f"{each['name']}:{each['version']}" for each in self.json("list")]

    @property
    def leftovers(self) -> list[str]:
        return sorted(each.name for each in (self.data / "models" / "partial").iterdir())


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Samples of the tiny convolution."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(9):
        array = np.random.default_rng(number).standard_normal((1, 3, IMAGE, IMAGE)).astype(np.float32)
        np.savez(folder / f"{number}.npz", image=array)
    return folder


def files_of(document: Any) -> dict[str, Path]:
    return {each["role"]: Path(each["path"]) for each in document["files"]}


def test_an_encoder_is_quantised_measured_and_registered(box: Box, tmp_path: Path) -> None:
    folder = tiny_encoders.write_tiny_encoder(tmp_path / "encoder")
    box.call("import", str(folder), "--name", "encoder", "--licence", "MIT")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("The pump stops.\nWhy is the motor hot?\n你好世界\n" * 4, encoding="utf-8")

    report = box.json("quantize", "encoder", "--samples", str(sentences))
    assert (report["original"], report["model"], report["was_present"]) == ("encoder:1", "encoder-int8:1", False)
    assert report["quantisation"]["mode"] == "dynamic"
    found = report["comparison"]
    assert found["data"] == "12 sentences of sentences.txt"
    assert not found["is_made_up"]
    assert (found["rows"], found["runs"]) == ([4, 8], 10)
    assert 2 < found["length"][0] <= found["length"][1] < 48
    (embedding,) = found["outputs"]
    assert embedding["name"] == "embedding"
    assert 0.95 < embedding["cosine_worst"] <= embedding["cosine_mean"] <= 1
    assert found["original"]["median_s"] > 0

    before, after = box.json("show", "encoder"), box.json("show", "encoder-int8")
    assert (after["kind"], after["task"], after["licence"]) == ("onnx", "embedding", "MIT")
    assert after["context_length"] == before["context_length"]
    assert after["quantisation"] == "int8"
    graph = files_of(before).pop("model"), files_of(after).pop("model")
    assert graph[0] != graph[1]
    assert {role: path for role, path in files_of(after).items() if role != "model"} == {
        role: path for role, path in files_of(before).items() if role != "model"
    }
    assert [each["bytes"] for each in (found["original"], found["quantised"])] == [
        each.stat().st_size for each in graph
    ]
    assert box.leftovers == []

    again = box.json("quantize", "encoder:1")
    assert (again["model"], again["was_present"]) == ("encoder-int8:1", True)
    assert again["comparison"]["is_made_up"]
    assert box.models == ["encoder:1", "encoder-int8:1"]

    box.call("remove", "encoder", "--yes")
    assert "sound" in box.call("verify", "encoder-int8")


def test_convolutions_are_quantised_by_samples_into_a_file(box: Box, tmp_path: Path, pictures: Path) -> None:
    box.call("import", str(convolution(tmp_path / "edges.onnx")))
    output = tmp_path / "out" / "edges8.onnx"
    output.parent.mkdir()
    arguments = ("quantize", "edges", "--static", "--samples", str(pictures), "--calibration", "minmax")
    shown = box.call(*arguments, "--output", str(output))
    assert "static int8" in shown
    assert "each fourth, not used for calibration" in shown
    assert all(word in shown for word in ("Original", "Size", "features", "Cosine, mean", f"{output} is ready."))
    assert [each.name for each in output.parent.iterdir()] == ["edges8.onnx"]
    assert "QuantizeLinear" in {each.op_type for each in onnx.load(output).graph.node}
    assert box.models == ["edges:1"]
    written = output.read_bytes()
    refused = box.error(*arguments, "--output", str(output), code=4)
    assert "already" in refused["message"]
    assert output.read_bytes() == written


def test_weights_beside_the_graph_come_along(box: Box, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    graph = perceptron(folder / "model.onnx")
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="weights.bin", size_threshold=0)
    box.call("import", str(folder), "--name", "wide")
    assert set(files_of(box.json("show", "wide"))) == {"model", "weights.bin"}
    report = box.json("quantize", "wide", "--name", "small", "--version", "7")
    assert report["model"] == "small:7"
    assert report["comparison"]["original"]["bytes"] > 32_000
    assert set(files_of(box.json("show", "small"))) == {"model"}


@pytest.mark.parametrize(
    ("write", "arguments", "code", "told"),
    [
        (tiny_onnx.identity, [], 5, "no weights that can be quantised"),
        (perceptron, ["--static"], 5, "needs to see inputs"),
        (perceptron, ["--symmetric"], 5, "Dynamic quantisation"),
        (perceptron, ["--calibration", "entropy"], 5, "Dynamic quantisation"),
        (perceptron, ["--samples", "/nowhere"], 3, "There is no folder /nowhere"),
        (perceptron, ["--samples", "/dev/null"], 3, "no folder /dev/null"),
        (perceptron, ["--name", "Über"], 5, "cannot be"),
        (perceptron, ["--output", "/nowhere/x.onnx"], 5, "no folder /nowhere"),
        (perceptron, ["--output", "x.onnx", "--version", "1"], 5, "neither name nor version"),
    ],
)
def test_a_refusal_changes_nothing(
    box: Box, tmp_path: Path, write: Callable[[Path], Path], *, arguments: list[str], code: int, told: str
) -> None:
    box.call("import", str(write(tmp_path / "model-a.onnx")), "--name", "a")
    blobs = sorted((box.data / "models" / "blobs").iterdir())
    assert told in box.call("quantize", "a", *arguments, code=code)
    assert box.models == ["a:1"]
    assert sorted((box.data / "models" / "blobs").iterdir()) == blobs
    assert box.leftovers == []


def test_what_is_quantised_or_of_another_kind_is_refused(box: Box, tmp_path: Path) -> None:
    box.call("import", str(perceptron(tmp_path / "a.onnx")))
    box.call("quantize", "a")
    assert "quantised already" in box.error("quantize", "a-int8", code=5)["message"]
    box.call("import", str(write_tiny_llama(tmp_path / "text.gguf")), "--name", "text")
    refused = box.error("quantize", "text", code=5)
    assert "GGUF model" in refused["message"]
    assert "llama-quantize" in refused["advice"]
    assert "no model 'b'" in box.error("quantize", "b", code=3)["message"]
    assert box.models == ["a:1", "a-int8:1", "text:1"]


def test_an_interruption_leaves_nothing_half_made(box: Box, tmp_path: Path, pictures: Path) -> None:
    box.call("import", str(convolution(tmp_path / "edges.onnx")))
    for number in range(9, 512):
        shutil.copy(pictures / "0.npz", pictures / f"{number}.npz")
    for how in (signal.SIGINT, signal.SIGKILL):
        arguments = ("quantize", "edges", "--static", "--samples", str(pictures), "--data", str(box.data))
        with start("models", *arguments) as process:
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    if line.startswith("Calibrating"):
                        process.send_signal(how)
                        break
                else:
                    pytest.fail("it never calibrated")
                assert process.wait(30) != 0
            finally:
                process.kill()
        assert box.models == ["edges:1"]
        assert len(box.leftovers) == (0 if how == signal.SIGINT else 1)  # what is killed cannot tidy up
    box.call("quantize", "edges", "--static", "--samples", str(pictures))
    assert box.leftovers == []
