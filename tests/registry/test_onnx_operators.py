from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import FunctionProto, ModelProto, helper

from appliance.core.errors import ModelFileError
from appliance.registry import onnx_operators
from appliance.registry.onnx_header import MAX_IR_VERSION, read_onnx
from appliance.registry.onnx_operators import MAX_OPSET, MIN_OPSET, check_operators
from tests.registry.onnx_models import changed
from tests.tiny_onnx import BATCH, identity, slow, tensor, unknown_operator, write


def model_of(*nodes: onnx.NodeProto, functions: tuple[FunctionProto, ...] = (), **opsets: int) -> ModelProto:
    values = [tensor(name, "FP32", (BATCH, 4)) for name in ("x", "y")]
    graph = helper.make_graph(list(nodes), "graph", values[:1], values[1:])
    versions = {"": 20, **{name.replace("_", "."): version for name, version in opsets.items()}}
    return helper.make_model(
        graph,
        functions=list(functions),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in versions.items()],
        ir_version=9,
    )


def function(name: str, *nodes: onnx.NodeProto) -> FunctionProto:
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    return helper.make_function("mine", name, ["x"], ["y"], list(nodes), versions)


def call(name: str, domain: str = "") -> onnx.NodeProto:
    return helper.make_node(name, ["x"], ["y"], domain=domain)


def test_the_installed_onnxruntime_takes_the_newest_versions_that_are_taken_here(tmp_path: Path) -> None:
    path = identity(tmp_path / "newest.onnx")

    def make_newest(model: ModelProto) -> None:
        model.opset_import[0].version, model.ir_version = MAX_OPSET, MAX_IR_VERSION

    changed(path, make_newest)
    assert read_onnx(path).signature.opset == MAX_OPSET
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 2), np.float32)})[0].shape == (1, 2)


@pytest.mark.parametrize("opset", [0, -1, MIN_OPSET - 1, MAX_OPSET + 1, 2**62])
def test_a_version_of_operators_that_cannot_run_is_refused(opset: int) -> None:
    model = model_of(call("Relu"))
    model.opset_import[0].version = opset
    with pytest.raises(ModelFileError, match=rf"version {opset} of the standard operators \(opset\)"):
        check_operators(model)


def test_a_model_without_versions_is_refused() -> None:
    model = model_of(call("Relu"))
    del model.opset_import[:]
    with pytest.raises(ModelFileError, match="version 0"):
        check_operators(model)


def test_two_versions_of_one_domain_are_refused() -> None:
    model = model_of(call("Relu"), ai_onnx=19)
    with pytest.raises(ModelFileError, match=r"two versions of the operators of 'ai\.onnx'"):
        check_operators(model)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (call("Frobnicate"), "'Frobnicate', which does not exist in version 20"),
        (call("Gelu", "ai.onnx.ml"), "'Gelu' of the domain 'ai.onnx.ml', which does not exist in version 3"),
        (call("Upsample"), "'Upsample', which does not exist in version 20"),  # withdrawn in version 10
        (call("FlexAttention"), "does not exist"),
        (call("ATen", "org.pytorch.aten"), "custom operator 'ATen' of the domain 'org.pytorch.aten'"),
        (call("Mine", "a domain\n" * 50), "custom operator"),
        (call("EPContext", "com.microsoft"), "foreign compiled code"),
        (call("Relu", "com.ms.internal.nhwc"), "custom operator"),
    ],
)
def test_an_operator_that_onnxruntime_lacks_is_named(node: onnx.NodeProto, reason: str) -> None:
    with pytest.raises(ModelFileError) as refused:
        check_operators(model_of(node, ai_onnx_ml=3))
    assert reason in refused.value.message
    assert len(refused.value.message) < 300


def test_a_domain_without_a_version_is_refused() -> None:
    with pytest.raises(ModelFileError, match="no version of that domain"):
        check_operators(model_of(call("Scaler", "ai.onnx.ml")))


def test_operators_of_onnxruntime_itself_are_taken() -> None:
    assert check_operators(model_of(call("FastGelu", "com.microsoft"), call("Relu", "ai.onnx"), com_microsoft=1)) == 20


def test_an_unknown_operator_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="'Frobnicate'"):
        read_onnx(unknown_operator(tmp_path / "model.onnx"))


def test_operators_inside_loops_are_looked_at(tmp_path: Path) -> None:
    path = slow(tmp_path / "loop.onnx")
    assert read_onnx(path).signature.opset == 20

    def spoil(model: ModelProto) -> None:
        (body,) = [each.g for each in model.graph.node[0].attribute if each.name == "body"]
        body.node[1].op_type = "Frobnicate"

    with pytest.raises(ModelFileError, match="'Frobnicate'"):
        read_onnx(changed(path, spoil))


def test_operators_in_lists_of_graphs_are_looked_at() -> None:
    inner = helper.make_graph([call("Frobnicate")], "inner", [], [])
    node = call("Relu")
    node.attribute.append(helper.make_attribute("branches", [inner]))
    with pytest.raises(ModelFileError, match="'Frobnicate'"):
        check_operators(model_of(node))


def test_functions_of_the_model_itself_are_operators_too() -> None:
    functions = (function("Twice", call("Once", "mine"), call("Once", "mine")), function("Once", call("Relu")))
    assert check_operators(model_of(call("Twice", "mine"), functions=functions, mine=1)) == 20


def test_operators_inside_functions_are_looked_at() -> None:
    with pytest.raises(ModelFileError, match="'Frobnicate'"):
        check_operators(model_of(call("Once", "mine"), functions=(function("Once", call("Frobnicate")),), mine=1))


@pytest.mark.parametrize(
    "functions",
    [
        (function("A", call("A", "mine")),),
        (function("A", call("B", "mine")), function("B", call("A", "mine"))),
        (function("A", call("B", "mine")), function("B", call("C", "mine")), function("C", call("B", "mine"))),
    ],
)
def test_a_function_that_calls_itself_is_refused(functions: tuple[FunctionProto, ...]) -> None:
    with pytest.raises(ModelFileError, match="calls itself"):
        check_operators(model_of(call("A", "mine"), functions=functions, mine=1))


def test_functions_that_grow_without_measure_are_refused() -> None:
    doubling = [function(f"F{n}", call(f"F{n + 1}", "mine"), call(f"F{n + 1}", "mine")) for n in range(40)]
    with pytest.raises(ModelFileError, match=r"at most 1,000,000 are taken"):
        check_operators(model_of(call("F0", "mine"), functions=(*doubling, function("F40", call("Relu"))), mine=1))


def test_a_function_defined_twice_is_refused() -> None:
    functions = (function("A", call("Relu")), function("A", call("Tanh")))
    with pytest.raises(ModelFileError, match="defines a function twice"):
        check_operators(model_of(call("A", "mine"), functions=functions, mine=1))


def test_more_operators_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_operators, "MAX_NODES", 2)
    with pytest.raises(ModelFileError, match="has 3 operators"):
        check_operators(model_of(call("Relu"), call("Relu"), call("Relu")))


def test_a_graph_may_hold_many_graphs(tmp_path: Path) -> None:
    inner = helper.make_graph([call("Relu")], "inner", [], [tensor("y", "FP32", (BATCH, 4))])
    for _ in range(20):
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([node], "inner", [], [tensor("y", "FP32", (BATCH, 4))])
        if inner.ByteSize() > 10**6:
            break
    path = write(tmp_path / "deep.onnx", inner.node, [tensor("c", "BOOL", ())], inner.output)
    assert read_onnx(path).signature.opset == 20
