from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from appliance.core.errors import ModelFileError, NotFoundError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.registry.onnx_header import MAX_GRAPH_BYTES, MAX_TENSORS, check_external, read_onnx
from tests.registry.onnx_models import changed, write_encoder
from tests.tiny_onnx import (
    BATCH,
    ELEMENT_TYPES,
    Dimension,
    external,
    fixed,
    identity,
    slow,
    stateful,
    strings,
    tabular,
    tensor,
    two_inputs,
    write,
)


def signature_of(path: Path) -> ModelSignature:
    return read_onnx(path).signature


def test_an_encoder_is_described_in_the_terms_of_the_protocol(tmp_path: Path) -> None:
    header = read_onnx(write_encoder(tmp_path / "model.onnx"))
    assert header.signature == ModelSignature(
        inputs=tuple(
            TensorSpec(name, Datatype.INT64, (-1, -1)) for name in ("input_ids", "attention_mask", "token_type_ids")
        ),
        outputs=(TensorSpec("last_hidden_state", Datatype.FP32, (-1, -1, 8)),),
        batched=True,
        opset=20,
    )
    assert (header.label, header.external, header.licence) == ("fp32", {}, "")


@pytest.mark.parametrize("datatype", ELEMENT_TYPES)
def test_every_datatype_of_the_protocol_is_known(tmp_path: Path, datatype: str) -> None:
    signature = signature_of(identity(tmp_path / "model.onnx", datatype, (BATCH, 3, "n")))
    assert signature.inputs == (TensorSpec("x", Datatype(datatype), (-1, 3, -1)),)
    assert signature.batched


@pytest.mark.parametrize(
    ("write_model", "batched"),
    [(tabular, True), (two_inputs, True), (strings, True), (slow, True), (fixed, False), (stateful, False)],
)
def test_a_batch_is_one_free_dimension_in_front_of_everything(
    tmp_path: Path, write_model: Callable[[Path], Path], batched: bool
) -> None:
    assert signature_of(write_model(tmp_path / "model.onnx")).batched is batched


@pytest.mark.parametrize(
    ("x", "y", "batched"),
    [
        ((BATCH, 2), (BATCH, 2), True),
        ((BATCH, 2), (None, 2), True),  # exporters lose the names of outputs
        ((None, 2), (None, 2), True),
        ((None, None), (None, None), True),
        ((-1, 2), (-1, 2), True),
        ((None, 2), ("m", 2), False),
        ((BATCH, 2), ("found", 2), False),
        ((1, 2), (1, 2), False),
        ((BATCH, 2), (1, 2), False),
        ((), (), False),
        ((BATCH, BATCH), (BATCH, 1), False),
    ],
)
def test_what_counts_as_a_batch(
    tmp_path: Path, x: tuple[Dimension, ...], y: tuple[Dimension, ...], batched: bool
) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    path = write(tmp_path / "model.onnx", [node], [tensor("x", "FP32", x)], [tensor("y", "FP32", y)])
    signature = signature_of(path)
    assert signature.batched is batched
    assert signature.inputs[0].shape == tuple(each if isinstance(each, int) and each >= 0 else -1 for each in x)


def test_a_model_without_inputs_has_no_batch(tmp_path: Path) -> None:
    node = helper.make_node("RandomNormal", [], ["y"], shape=[2])
    path = write(tmp_path / "model.onnx", [node], [], [tensor("y", "FP32", (BATCH,))])
    assert signature_of(path) == ModelSignature((), (TensorSpec("y", Datatype.FP32, (-1,)),), batched=False, opset=20)


def test_initializers_are_no_inputs(tmp_path: Path) -> None:
    path = changed(
        tabular(tmp_path / "model.onnx"), lambda model: model.graph.input.append(tensor("weights", "FP32", (4, 3)))
    )
    assert [each.name for each in signature_of(path).inputs] == ["features"]


def test_an_output_without_a_shape_is_taken_for_one_free_dimension(tmp_path: Path) -> None:
    path = changed(
        tabular(tmp_path / "model.onnx"),
        lambda model: model.graph.output[0].type.tensor_type.ClearField("shape"),
    )
    signature = signature_of(path)
    assert signature.outputs[0].shape == (-1,)
    assert not signature.batched


def test_outputs_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, [1]))
    )
    value = helper.make_value_info("maps", maps)
    path = changed(tabular(tmp_path / "model.onnx"), lambda model: model.graph.output.append(value))
    signature = signature_of(path)
    assert [each.name for each in signature.outputs] == ["probabilities"]
    assert not signature.batched


def test_the_licence_and_the_type_of_the_weights_are_told(tmp_path: Path) -> None:
    path = changed(tabular(tmp_path / "model.onnx"), lambda model: model.metadata_props.add(key="License", value="MIT"))
    assert (read_onnx(path).licence, read_onnx(path).label) == ("MIT", "fp32")


def only_sequence_inputs(model: ModelProto) -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [1]))
    model.graph.input[0].CopyFrom(helper.make_value_info("images", kind))


def only_sequence_outputs(model: ModelProto) -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [1]))
    model.graph.output[0].CopyFrom(helper.make_value_info("maps", kind))


def many_inputs(model: ModelProto) -> None:
    model.graph.input.extend(tensor(f"x{number}", "FP32", (1,)) for number in range(MAX_TENSORS))


def many_dimensions(model: ModelProto) -> None:
    model.graph.input[0].CopyFrom(tensor("features", "FP32", (1,) * 65))


def set_field(path: str, value: object) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        *parents, last = path.split(".")
        message = model
        for each in parents:
            message = message[int(each)] if each.isdecimal() else getattr(message, each)
        setattr(message, last, value)

    return change


REFUSED: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "no version": (lambda model: model.ClearField("ir_version"), "version 0 of the ONNX format; 3 to 13"),
    "version 2": (set_field("ir_version", 2), "version 2 of the ONNX format"),
    "newer version": (set_field("ir_version", 2**40), "of the ONNX format"),
    "no operators": (lambda model: model.graph.ClearField("node"), "0 operators and 1 outputs"),
    "no outputs": (lambda model: model.graph.ClearField("output"), "2 operators and 0 outputs"),
    "no graph": (lambda model: model.ClearField("graph"), "0 operators and 0 outputs"),
    "a sequence as input": (only_sequence_inputs, "'images' of the ONNX model is a sequence; only tensors"),
    "a sequence as only output": (only_sequence_outputs, "no output that is a tensor"),
    "an input of no type": (lambda model: model.graph.input[0].ClearField("type"), "is of no type"),
    "an input of complex numbers": (
        set_field("graph.input.0.type.tensor_type.elem_type", TensorProto.COMPLEX64),
        "the element type 14",
    ),
    "an input without a shape": (
        lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
        "has no shape, not even",
    ),
    "an input without a name": (set_field("graph.input.0.name", ""), "the name ''"),
    "a name that drives the terminal": (set_field("graph.output.0.name", "\x1b[2J"), "which cannot be"),
    "a name as long as a book": (set_field("graph.output.0.name", "x" * 10**5), "which cannot be"),
    "one name for two": (lambda model: model.graph.input.append(model.graph.input[0]), "Two inputs"),
    "a crowd of inputs": (many_inputs, f"{MAX_TENSORS + 1:,} inputs and 1 outputs"),
    "a crowd of dimensions": (many_dimensions, "has 65 dimensions"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: Callable[[ModelProto], object], reason: str) -> None:
    path = changed(tabular(tmp_path / "model.onnx"), change)
    with pytest.raises(ModelFileError) as refused:
        read_onnx(path)
    assert reason in refused.value.message
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF\3\0\0\0",
        b"PK\x03\x04",
        b"<html>",
        b"version https://git-lfs",
        b"\0" * 100,
        b"\xff" * 100,
        b"\x0a\xff",
        b"\x3a\x04" * 1000,
    ],
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        read_onnx(path)


@pytest.mark.parametrize(
    ("write_model", "text"),
    [
        (tabular, b"features"),
        (tabular, b"Softmax"),
        (external, b"weights.bin"),
        (external, b"location"),
    ],
)
def test_text_that_is_not_utf_8_is_refused(tmp_path: Path, write_model: Callable[[Path], Path], text: bytes) -> None:
    path = write_model(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes().replace(text, b"\xff" * len(text)))
    with pytest.raises(ModelFileError, match="stands where a text in UTF-8 is due"):
        read_onnx(path)


@pytest.mark.parametrize("place", [b"", b"\xff"])
def test_bytes_in_a_dimensions_name_are_only_a_name(tmp_path: Path, place: bytes) -> None:
    path = tabular(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes().replace(b"batch", b"batc" + (place or b"h")))
    assert signature_of(path).batched


def test_a_file_too_large_for_a_message_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_GRAPH_BYTES + 1)
    with pytest.raises(ModelFileError, match=r"has 2,147,483,648 bytes; an ONNX file has at most 2,147,483,647"):
        read_onnx(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"model\.onnx"):
        read_onnx(tmp_path / "model.onnx")


def test_data_files_must_be_there_in_full(tmp_path: Path) -> None:
    header = read_onnx(external(tmp_path / "model.onnx"))
    data = tmp_path / "weights.bin"
    check_external(header, {"weights.bin": data})
    with pytest.raises(ModelFileError, match=r"keeps data in 'weights\.bin', which is missing"):
        check_external(header, {})
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="has 63 bytes; 64 are due"):
        check_external(header, {"weights.bin": data})


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("sound")
    writers: list[Callable[[Path], Path]] = [tabular, slow, stateful, external, write_encoder]
    return [each(folder / f"{number}.onnx").read_bytes() for number, each in enumerate(writers)]


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, contents: list[bytes], data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(contents)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 1]))])
    try:
        header = read_onnx(path)
        check_external(header, {})
    except ModelFileError:
        return
    assert header.signature.outputs


@FUZZ
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_read_or_refused(tmp_path: Path, contents: list[bytes], data: st.DataObject) -> None:
    content = data.draw(st.sampled_from(contents))
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        read_onnx(path)
    except ModelFileError:
        return
