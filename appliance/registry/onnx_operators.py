"""Whether every operator of an ONNX model is one that onnxruntime has without further libraries.

Custom operators are native code that a model cannot bring along, and two of onnxruntime's own hold native code of an
accelerator or lead to a file of it; both are refused by name. So are calls of model-local functions that end nowhere or
grow without measure, since native code puts each function's body in the place of each call.

Sources: docs/IR.md and docs/Operators.md of ONNX; docs/ContribOperators.md and docs/Versioning.md of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, defs

from appliance.core.errors import ModelFileError

MAX_OPSET = 26
"""Newest version of the standard operators that onnxruntime 1.31 takes. The onnx package describes newer ones than
onnxruntime has, and loading onnxruntime just to ask it is forbidden here; a test asks the installed one."""

MIN_OPSET = 7
"""Oldest version that onnxruntime promises to run."""

MAX_NODES = 1_000_000
"""Operators of a model, each call of a function counted as the operators of its body."""

_STANDARD = frozenset({"", "ai.onnx"})
_DESCRIBED = _STANDARD | {"ai.onnx.ml"}
"""Domains whose operators the onnx package knows."""

_BUILT_IN = frozenset({"com.microsoft", "com.microsoft.nchwc"})
"""Domains of operators that are part of onnxruntime; it says itself which of them it lacks."""

_FOREIGN_CODE = frozenset({"EPContext", "Snpe"})
"""Operators of onnxruntime that hand compiled code, from the model or from a file it names, to an accelerator."""

_Key = tuple[str, str]


def check_operators(model: ModelProto) -> int:
    """Check the operators of all graphs and functions, and return the opset of the standard domain.

    Raises:
        ModelFileError: The opset is too old or too new, or an operator does not exist or may not be used; the message
            names it.
    """
    opsets = _opsets(model.opset_import)
    opset = opsets.get("", 0)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ModelFileError(
            f"The ONNX file asks for version {opset} of the standard operators (opset); "
            f"{MIN_OPSET} to {MAX_OPSET} can be run.",
            advice="Export it again with another opset, or convert it with the onnx package's version_converter.",
        )
    functions = {_key(each.domain, each.name): each for each in model.functions}
    if len(functions) != len(model.functions):
        raise ModelFileError("The ONNX file defines a function twice.", advice="Export it again.")
    for node in nodes_of(model.graph.node):
        _check(node, opsets, functions)
    for function in functions.values():
        inner = _opsets(function.opset_import)
        for node in nodes_of(function.node):
            _check(node, inner, functions)
    _check_growth(model.graph, functions)
    return opset


def nodes_of(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield the nodes and those of all graphs inside them."""
    waiting: list[Iterable[NodeProto]] = [nodes]
    while waiting:
        for node in waiting.pop():
            yield node
            waiting += [graph.node for graph in graphs_inside(node)]


def graphs_inside(node: NodeProto) -> list[GraphProto]:
    """Return the graphs that a node has as attributes, such as the branches of `If`."""
    return [
        graph
        for attribute in node.attribute
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)
    ]


def checked_text(value: object) -> str:
    """Return a text of a message, which protobuf gives as bytes where it is not UTF-8.

    Raises:
        ModelFileError: It is not UTF-8.
    """
    if not isinstance(value, str):
        raise ModelFileError(
            f"The ONNX file is damaged: {value!r:.80} stands where a text in UTF-8 is due.", advice="Fetch it again."
        )
    return value


def _key(domain: str, name: str) -> _Key:
    domain = checked_text(domain)
    return ("" if domain in _STANDARD else domain, checked_text(name))


def _opsets(imports: Sequence[OperatorSetIdProto]) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for each in imports:
        domain, _ = _key(each.domain, "")
        if domain in found:
            raise ModelFileError(f"The ONNX file gives two versions of the operators of {domain or 'ai.onnx'!r:.80}.")
        found[domain] = each.version
    return found


def _check(node: NodeProto, opsets: Mapping[str, int], functions: Mapping[_Key, FunctionProto]) -> None:
    domain, name = _key(node.domain, node.op_type)
    if (domain, name) in functions:
        return
    shown = f"{name!r:.80}" + (f" of the domain {domain!r:.80}" if domain else "")
    if domain in _BUILT_IN:
        if name in _FOREIGN_CODE:
            raise ModelFileError(
                f"The ONNX file uses the operator {shown}, which hands foreign compiled code to an accelerator.",
                advice="Export the model itself, without what an accelerator's tool made of it.",
            )
        return
    if domain not in _DESCRIBED:
        raise ModelFileError(
            f"The ONNX file uses the custom operator {shown}, which onnxruntime does not have.",
            advice="Export it without custom operators; libraries of operators are not loaded.",
        )
    if domain not in opsets:
        raise ModelFileError(f"The ONNX file uses the operator {shown}, and gives no version of that domain.")
    _check_described(domain, name, opsets[domain], shown)


def _check_described(domain: str, name: str, opset: int, shown: str) -> None:
    try:
        is_current = 0 < opset < 2**31 and not defs.get_schema(name, opset, domain).deprecated
    except defs.SchemaError:
        is_current = False
    if not is_current:
        raise ModelFileError(
            f"The ONNX file uses the operator {shown}, which does not exist in version {opset} of its operators.",
            advice="The file is damaged, or another tool's; export it again.",
        )


def _check_growth(graph: GraphProto, functions: Mapping[_Key, FunctionProto]) -> None:
    """Refuse functions that call themselves, and calls that come to more operators than any honest model has."""
    sizes: dict[_Key, int] = {}
    pending = list(functions)
    open_calls: set[_Key] = set()
    while pending:
        key = pending[-1]
        if key in sizes:
            pending.pop()
            continue
        called = [each for each in _called(functions[key].node, functions) if each not in sizes]
        if key in open_calls and called:
            raise ModelFileError(
                f"The function {key[1]!r:.80} of the ONNX file calls itself.", advice="Export it again."
            )
        open_calls.add(key)
        pending += called
        if not called:
            sizes[key] = _size(functions[key].node, sizes)
    _size(graph.node, sizes)


def _called(nodes: Iterable[NodeProto], functions: Mapping[_Key, FunctionProto]) -> set[_Key]:
    keys = (_key(node.domain, node.op_type) for node in nodes_of(nodes))
    return {key for key in keys if key in functions}


def _size(nodes: Iterable[NodeProto], sizes: Mapping[_Key, int]) -> int:
    total = sum(sizes.get(_key(node.domain, node.op_type), 1) for node in nodes_of(nodes))
    if total > MAX_NODES:
        raise ModelFileError(
            f"The ONNX file has {total:,} operators once its functions are put in place; "
            f"at most {MAX_NODES:,} are taken."
        )
    return total
