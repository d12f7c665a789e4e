"""Inputs from files of others, and made-up ones."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import InvalidRequestError, ModelFileError, NotFoundError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.engine.onnx import samples
from appliance.engine.onnx.samples import ArrayFiles, MadeUp, read_sentences
from appliance.engine.onnx.side_by_side import Session
from appliance.engine.onnx.trials import tensor_trial
from appliance.engine.onnx.work import Arrays
from tests import tiny_onnx


def signature(*inputs: tuple[str, str, tuple[int, ...]]) -> ModelSignature:
    return ModelSignature(tuple(TensorSpec(name, Datatype(kind), shape) for name, kind, shape in inputs), (), True)


PAIR = signature(("a", "FP32", (-1, 4)), ("b", "INT64", (2,)))


def good() -> dict[str, Any]:
    return {"a": np.zeros((3, 4), np.float32), "b": np.arange(2)}


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        np.savez(tmp_path / f"{number}.npz", a=np.full((1, 4), number, np.float32), b=np.arange(2))
    (tmp_path / "readme.txt").write_text("not for us")
    files = ArrayFiles(tmp_path, PAIR)
    assert [float(files[each]["a"][0, 0]) for each in range(len(files))] == [0, 1, 2]


def test_strings_are_read_as_such(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", text=np.array([["a", "bc"]]))
    files = ArrayFiles(tmp_path, signature(("text", "BYTES", (-1, 2))))
    assert files[0]["text"].tolist() == [["a", "bc"]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"a": np.zeros((3, 5), np.float32)}, r"a is float32 \[3, 5\]; the model takes FP32 \[-1, 4\]"),
        ({"a": np.zeros(4, np.float32)}, r"a is float32 \[4\]"),
        ({"a": np.zeros((3, 4))}, "a is float64"),
        ({"b": np.array([0.0, np.nan])}, "b is float64"),
        ({"c": np.zeros(1)}, "has the arrays a, b, c; the model takes a, b"),
        ({"a": np.array([object()])}, "no sound"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    np.savez(tmp_path / "1.npz", **(good() | changes))
    with pytest.raises(InvalidRequestError, match=told):
        ArrayFiles(tmp_path, PAIR)[0]


def test_a_missing_array_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", a=good()["a"])
    with pytest.raises(InvalidRequestError, match="has the arrays a; the model takes a, b"):
        ArrayFiles(tmp_path, PAIR)[0]


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "1.npz", **(good() | {"a": np.zeros((10_000, 4), np.float32)}))
    assert (tmp_path / "1.npz").stat().st_size < 2000
    monkeypatch.setattr(samples, "MOST_ARRAY_BYTES", 100_000)
    with pytest.raises(InvalidRequestError, match=r"unpacks to 160,2\d\d bytes"):
        ArrayFiles(tmp_path, PAIR)[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"x" * 100])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1.npz").write_bytes(content)
    with pytest.raises(InvalidRequestError, match="no sound"):
        ArrayFiles(tmp_path, PAIR)[0]


def test_an_archive_with_anything_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "1.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00\x10\x00nonsense")
    with pytest.raises(InvalidRequestError, match="no sound"):
        ArrayFiles(tmp_path, PAIR)[0]


def test_a_folder_without_samples_is_refused_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="has no") as refused:
        ArrayFiles(tmp_path, PAIR)
    assert "a=… of FP32 [-1, 4], b=… of INT64 [2]" in refused.value.advice
    with pytest.raises(NotFoundError):
        ArrayFiles(tmp_path / "nowhere", PAIR)


def test_sentences_are_lines_of_text_or_json(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("One.\n\n  \nZwei — 二.\n", encoding="utf-8")
    lines.write_text('"One."\n\n{"text": "Zwei — 二.", "more": 1}\n', encoding="utf-8")
    assert read_sentences(text) == read_sentences(lines) == ["One.", "Zwei — 二."]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\n \n", "has no sentence"),
        ("a.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.jsonl", b'"a"\n{', "Line 2 of .* is not JSON"),
        ("a.jsonl", b'{"texts": "a"}', "Line 1 of .* neither a string"),
        ("a.jsonl", b"[1]", "Line 1 of .* neither a string"),
    ],
)
def test_files_without_sentences_are_refused(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequestError, match=told):
        read_sentences(tmp_path / name)


def test_sentences_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\n" * 5000)
    assert len(read_sentences(path)) == samples.MOST_SENTENCES
    monkeypatch.setattr(samples, "MOST_TEXT_BYTES", 1000)
    with pytest.raises(InvalidRequestError, match="25,000 bytes; at most 1,000"):
        read_sentences(path)
    with pytest.raises(NotFoundError):
        read_sentences(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("write", "inputs", "shapes"),
    [
        (tiny_onnx.tabular, signature(("features", "FP32", (-1, 4))), {"features": (1, 4)}),
        (tiny_onnx.fixed, signature(("x", "FP32", (1, 4))), {"x": (1, 4)}),
        (
            tiny_onnx.stateful,
            signature(("x", "FP32", (-1, -1)), ("state", "FP32", (2, -1, -1)), ("rate", "INT64", ())),
            {"x": (1, 64), "state": (2, 64, 64), "rate": ()},
        ),
        (tiny_onnx.strings, signature(("text", "BYTES", (-1, -1))), {"text": (1, 64)}),
        (tiny_onnx.fallible, signature(("index", "INT64", (-1, -1))), {"index": (1, 64)}),
    ],
)
def test_inputs_are_made_up_that_the_model_runs_with(
    tmp_path: Path, write: Any, inputs: ModelSignature, shapes: dict[str, tuple[int, ...]]
) -> None:
    session = Session(write(tmp_path / "model.onnx"), 1)
    made_up = MadeUp(inputs, session.can_run)
    for each in range(len(made_up)):
        assert {name: np.shape(array) for name, array in made_up[each].items()} == shapes
        session.run(made_up[each])
    again = MadeUp(inputs, session.can_run)
    assert all(np.array_equal(made_up[3][name], again[3][name]) for name in shapes)


def test_what_cannot_be_made_up_is_asked_for(tmp_path: Path) -> None:
    session = Session(tiny_onnx.particular(tmp_path / "model.onnx"), 1)
    with pytest.raises(InvalidRequestError, match="could be made up") as refused:
        MadeUp(signature(("x", "FP32", (-1, -1))), session.can_run)
    assert "--samples" in refused.value.advice
    with pytest.raises(ModelFileError, match="BF16"):
        MadeUp(signature(("x", "BF16", (-1, -1))), lambda _: True)


def test_each_fourth_sample_is_kept_back_from_calibration(tmp_path: Path) -> None:
    for number in range(10):
        np.savez(tmp_path / f"{number}.npz", a=np.full((1, 4), number, np.float32), b=np.arange(2))

    def numbers(arrays: Arrays) -> float:
        return float(arrays["a"][0, 0])

    trial = tensor_trial(PAIR, tmp_path, lambda _: False)
    seen, unseen = trial.parted()
    assert [numbers(seen.samples[each]) for each in range(len(seen))] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert [numbers(unseen.samples[each]) for each in range(len(unseen))] == [3, 7]
    assert "not used for calibration" in unseen.data
    assert not trial.is_made_up


def test_few_samples_serve_for_both(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", **good())
    seen, measured = tensor_trial(PAIR, tmp_path, lambda _: False).parted()
    assert len(seen) == len(measured) == 1
    assert "the same as for calibration" in measured.data


def test_sentences_are_of_no_use_to_a_model_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.")
    with pytest.raises(InvalidRequestError, match="takes tensors and not texts"):
        tensor_trial(PAIR, tmp_path / "a.txt", lambda _: True)
