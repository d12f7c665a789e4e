"""`POST /v2/models/{model}/infer` over a real server."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.api.oip import infer as infer_module
from appliance.api.oip.infer import BodyBudget
from appliance.core.errors import DeadlineExceededError, EngineError, OverloadedError, UnavailableError
from appliance.core.tensors import Datatype, Tensor
from appliance.core.types import Priority
from tests.api.boxes import Reply, ScriptedBox, post, scripted_box, until, wire
from tests.api.scripted_tensors import card_of

pytestmark = pytest.mark.anyio

PATH = "/v2/models/echo/infer"
TENSOR = {"name": "fp32", "shape": [2, 2], "datatype": "FP32", "data": [1.5, 2, 3, 4]}
FLOATS = np.array([[1.5, 2], [3, 4]], np.float32)
BINARY_INPUT = {"name": "fp32", "shape": [2, 2], "datatype": "FP32", "parameters": {"binary_data_size": 16}}


async def infer(box: ScriptedBox, document: Any, binary: bytes = b"", **headers: str) -> Reply:
    text = json.dumps(document).encode()
    sent = {"inference-header-content-length": str(len(text))} if binary else {}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    return await box.ask("POST", PATH, body=text + binary, headers=sent)


def binary_of(reply: Reply) -> tuple[Any, bytes]:
    """Return the JSON of an answer and what is behind it."""
    length = int(reply.headers["inference-header-content-length"])
    return json.loads(reply.body[:length]), reply.body[length:]


@pytest.mark.parametrize("data", [[1.5, 2, 3, 4], [[1.5, 2], [3, 4]]])
async def test_json_in_and_json_out(box: ScriptedBox, data: Any) -> None:
    reply = await infer(box, {"id": "a 1", "inputs": [{**TENSOR, "data": data}]})
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {
        "model_name": "echo",
        "model_version": "2",
        "id": "a 1",
        "outputs": [{"name": "fp32", "datatype": "FP32", "shape": [2, 2], "data": [1.5, 2.0, 3.0, 4.0]}],
    }
    [request] = box.tensors.requests
    assert (request.model, request.version, request.outputs) == ("echo", "", ("fp32",))
    assert (request.priority, request.deadline_s) == (Priority.DEFAULT, 600.0)
    assert request.inputs[0].array.tolist() == FLOATS.tolist()


async def test_a_version_that_the_path_names(box: ScriptedBox) -> None:
    reply = await box.ask("POST", "/v2/models/echo/versions/1/infer", {"inputs": [TENSOR]})
    assert reply.status == 200
    assert box.tensors.requests[0].version == "1"


@pytest.mark.parametrize(
    ("parameters", "output"),
    [({"binary_data_output": True}, None), (None, {"binary_data": True}), ({"binary_data_output": True}, {})],
)
async def test_binary_in_and_binary_out(box: ScriptedBox, parameters: Any, output: Any) -> None:
    document: dict[str, Any] = {"inputs": [BINARY_INPUT], "parameters": parameters}
    if output is not None:
        document["outputs"] = [{"name": "fp32", "parameters": output}]
    reply = await infer(box, document, FLOATS.tobytes())
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/octet-stream"
    header, data = binary_of(reply)
    assert header["outputs"] == [
        {"name": "fp32", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}}
    ]
    assert "id" not in header
    assert data == FLOATS.tobytes()


async def test_an_output_may_differ_from_the_request(box: ScriptedBox) -> None:
    outputs = [{"name": "fp32", "parameters": {"binary_data": False}}]
    document = {"inputs": [TENSOR], "outputs": outputs, "parameters": {"binary_data_output": True}}
    assert (await infer(box, document)).json()["outputs"][0]["data"] == [1.5, 2, 3, 4]


async def test_json_and_binary_inputs_and_outputs_in_one_request(box: ScriptedBox) -> None:
    box.tensors.now = card_of(Datatype.BYTES, Datatype.FP16, Datatype.INT8)
    words = b"\x02\0\0\0hi\0\0\0\0"
    halves = np.array([[1, 2]], np.float16)
    document = {
        "inputs": [
            {"name": "fp16", "shape": [1, 2], "datatype": "FP16", "parameters": {"binary_data_size": 4}},
            {"name": "int8", "shape": [1, 1], "datatype": "INT8", "data": [-5]},
            {"name": "bytes", "shape": [2, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(words)}},
        ],
        "outputs": [
            {"name": "int8"},
            {"name": "bytes", "parameters": {"binary_data": True}},
            {"name": "fp16", "parameters": {"binary_data": True}},
        ],
    }
    header, data = binary_of(await infer(box, document, halves.tobytes() + words))
    assert [each["name"] for each in header["outputs"]] == ["int8", "bytes", "fp16"]
    assert header["outputs"][0]["data"] == [-5]
    assert data == words + halves.tobytes()


async def test_empty_tensors(box: ScriptedBox) -> None:
    box.tensors.now = card_of(Datatype.FP32, Datatype.INT8)
    inputs: list[Any] = [{"name": "fp32", "shape": [0, 3], "datatype": "FP32", "parameters": {"binary_data_size": 0}}]
    inputs.append({"name": "int8", "shape": [1, 1], "datatype": "INT8", "data": [7]})
    document = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    header, data = binary_of(await infer(box, document, inference_header_content_length=str(len(json.dumps(document)))))
    assert (header["outputs"][0]["shape"], data) == ([0, 3], b"\x07")


async def test_the_highest_classes_of_an_output(box: ScriptedBox) -> None:
    document = {"inputs": [TENSOR], "outputs": [{"name": "fp32", "parameters": {"classification": 1}}]}
    output = {"name": "fp32", "datatype": "BYTES", "shape": [2, 1], "data": ["2.000000:1", "4.000000:1"]}
    assert (await infer(box, document)).json()["outputs"] == [output]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(0, Priority.DEFAULT), (1, Priority.PRIORITY), (2, Priority.DEFAULT), (3, Priority.FLEX), (99, Priority.FLEX)],
)
async def test_priority_1_is_the_highest(box: ScriptedBox, given: int, wanted: Priority) -> None:
    await infer(box, {"inputs": [TENSOR], "parameters": {"priority": given}})
    assert box.tensors.requests[0].priority is wanted


async def test_no_request_is_above_the_highest_tier_of_its_key(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        _, secret = box.keys.create("slow", ["inference"], highest_tier=Priority.FLEX)
        document = {"inputs": [TENSOR], "parameters": {"priority": 1}}
        assert (await infer(box, document, authorization=f"Bearer {secret}")).status == 200
        assert box.tensors.requests[0].priority is Priority.FLEX


@pytest.mark.parametrize(("given", "wanted"), [(0, 600.0), (1_500_000, 1.5), (10**18, 600.0)])
async def test_timeout_is_in_microseconds(box: ScriptedBox, given: int, wanted: float) -> None:
    await infer(box, {"inputs": [TENSOR], "parameters": {"timeout": given}})
    assert box.tensors.requests[0].deadline_s == wanted


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([], "expected `object`, got `array`"),
        ({}, "missing required field `inputs`"),
        ({"inputs": {}}, "inputs: expected `array`"),
        ({"inputs": [{}]}, "missing required field"),
        ({"inputs": [TENSOR], "input": 1}, "'input' is no parameter"),
        ({"inputs": [{**TENSOR, "shape": [2, -2]}]}, r"inputs[0].shape[1]: expected `int` >= 0"),
        ({"inputs": [{**TENSOR, "shape": [2, 2.0]}]}, r"inputs[0].shape[1]: expected `int`, got `float`"),
        ({"inputs": [{**TENSOR, "shape": [2, True]}]}, r"inputs[0].shape[1]: expected `int`, got `bool`"),
        ({"inputs": [{**TENSOR, "shape": [2**64, 2]}]}, r"inputs[0].shape[0]: "),
        ({"inputs": [{**TENSOR, "shape": [2**62, 4]}]}, "more elements than can be counted"),
        ({"inputs": [{**TENSOR, "shape": [2**30]}]}, "and data has fewer"),
        ({"inputs": [{**TENSOR, "datatype": "FP8"}]}, "the datatypes are BOOL"),
        ({"inputs": [{**TENSOR, "data": [1, 2]}]}, "inputs[0] ('fp32'): a shape of [2, 2] has 4 elements"),
        ({"inputs": [TENSOR, TENSOR]}, "inputs[1] ('fp32'): the name stands there twice"),
        ({"inputs": [TENSOR], "outputs": [{"name": "fp32"}] * 2}, "outputs[1] ('fp32'): the name stands there twice"),
        ({"inputs": [TENSOR], "outputs": [{"name": "y"}]}, "outputs[0] ('y'): the model has no such output"),
        ({"inputs": [{**TENSOR, "name": "x"}]}, "'x' is no FP32 input"),
        ({"inputs": [{**TENSOR, "parameters": {"binary_data_size": 0}}]}, "both data and binary_data_size"),
        ({"inputs": [BINARY_INPUT]}, "announce 16 bytes of binary data, and 0 follow"),
        ({"inputs": [{**BINARY_INPUT, "parameters": {}}]}, "neither data nor the parameter"),
        ({"inputs": [{**BINARY_INPUT, "parameters": {"binary_data_size": -1}}]}, "expected `int` >= 0"),
        ({"inputs": [{**TENSOR, "parameters": {"shared_memory_region": "r"}}]}, "shared memory is not supported"),
        ({"inputs": [TENSOR], "parameters": {"sequence_id": 5}}, "sequences are not supported"),
        ({"inputs": [TENSOR], "parameters": {"sequence_start": True}}, "sequences are not supported"),
        ({"inputs": [TENSOR], "parameters": {"temperature": 1}}, "'parameters.temperature' is no parameter"),
        ({"inputs": [TENSOR], "parameters": {"priority": -1}}, "parameters.priority"),
        ({"inputs": [TENSOR], "parameters": {"timeout": 1.5}}, "parameters.timeout"),
        ({"id": 5, "inputs": [TENSOR]}, "id: expected `str"),
    ],
)
async def test_a_request_that_will_not_do_is_refused_with_its_place(
    box: ScriptedBox, document: Any, problem: str
) -> None:
    reply = await infer(box, document)
    assert reply.status == 400
    assert problem in reply.inference_error
    assert box.tensors.requests == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "is empty"),
        (b"{", "not valid JSON"),
        (b'{"inputs": [NaN]}', "not valid JSON"),
        (b'{"inputs": ' + b"[" * 100_000, "not valid JSON|nested too deeply|expected `object`"),
        (b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ' + b"[" * 50_000, "nested too deeply"),
        (b'{"inputs": [], "id": "\xff"}', "not valid JSON"),
        (b'"text"', "expected `object`"),
        (b"null", "expected `object`"),
    ],
)
async def test_what_is_no_json_object_is_refused(box: ScriptedBox, body: bytes, problem: str) -> None:
    reply = await box.ask("POST", PATH, body=body, headers={"content-type": "application/json"})
    assert reply.status == 400
    assert any(each in reply.inference_error for each in problem.split("|"))


@pytest.mark.parametrize(
    ("length", "problem"),
    [
        ("-1", "must be the number of bytes"),
        ("ten", "must be the number of bytes"),
        ("1.0", "must be the number of bytes"),
        ("", "must be the number of bytes"),
        ("9" * 30, "must be the number of bytes"),
        ("٣", "must be the number of bytes"),
        ("0", "without JSON is not supported"),
        ("100000", "has only"),
        ("10", "not valid JSON"),
    ],
)
async def test_a_header_length_that_cannot_be_is_refused(box: ScriptedBox, length: str, problem: str) -> None:
    text = json.dumps({"inputs": [BINARY_INPUT]}).encode()
    async with wire(box) as peer:
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nInference-Header-Content-Length: {length}\r\n"
        await peer.send(f"{head}Content-Length: {len(text) + 16}\r\n\r\n".encode() + text + FLOATS.tobytes())
        reply = await peer.read_reply()
    assert reply.status == 400
    assert problem in reply.inference_error


async def test_what_only_binary_data_can_say_is_refused_before_anything_is_evaluated(box: ScriptedBox) -> None:
    box.tensors.now = card_of(Datatype.FP16)
    tensor = {"name": "fp16", "shape": [1, 1], "datatype": "FP16", "parameters": {"binary_data_size": 2}}
    reply = await infer(box, {"inputs": [tensor]}, b"\0\0")
    assert (reply.status, box.tensors.requests) == (400, [])
    assert "FP16 has no JSON" in reply.inference_error
    box.tensors.now = card_of(Datatype.BYTES)
    words = {"name": "bytes", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    wanted = [{"name": "bytes", "parameters": {"classification": 1}}]
    reply = await infer(box, {"inputs": [words], "outputs": wanted})
    assert "classification needs numbers" in reply.inference_error


async def test_an_answer_that_json_cannot_say_is_refused(box: ScriptedBox) -> None:
    tensor = {**TENSOR, "parameters": {"binary_data_size": 16}}
    del tensor["data"]
    reply = await infer(box, {"inputs": [tensor]}, np.full(4, np.nan, np.float32).tobytes())
    assert reply.status == 400
    assert "JSON has no NaN" in reply.inference_error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("Full.", retry_after_s=3), 429),
        (UnavailableError("Open.", code="circuit_open"), 503),
        (DeadlineExceededError("Late."), 503),
        (EngineError("Secret."), 500),
        (RuntimeError("Secret."), 500),
    ],
)
async def test_errors_of_the_engine_have_the_protocols_shape(box: ScriptedBox, error: Exception, status: int) -> None:
    box.tensors.refusals.append(error)
    reply = await infer(box, {"inputs": [TENSOR]})
    assert reply.status == status
    assert "Secret" not in reply.inference_error
    assert ("retry-after" in reply.headers) is (status in (429, 503))


async def test_errors_of_the_door_have_the_protocols_shape(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        _, secret = box.keys.create("reader", ["inference"])
        key = {"authorization": f"Bearer {secret}"}
        replies = {
            401: await infer(box, {"inputs": [TENSOR]}),
            404: await box.ask("GET", "/v2/nothing", headers=key),
            405: await box.ask("GET", PATH, headers=key),
            403: await box.ask("POST", "/v2/repository/models/echo/load", headers=key),
            415: await box.ask("POST", PATH, body=b"x", headers={**key, "content-type": "text/plain"}),
        }
        for status, reply in replies.items():
            assert reply.status == status
            assert reply.inference_error
        unknown = await box.ask("POST", "/v2/models/other/infer", {"inputs": [TENSOR]}, headers=key)
        assert unknown.status == 404
        assert "there is echo" in unknown.inference_error


async def test_a_gigabyte_is_refused_before_it_is_read(box: ScriptedBox) -> None:
    async with wire(box) as peer:
        await peer.send(f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {2**30}\r\n\r\n".encode())
        reply = await peer.read_reply()
    assert reply.status == 413
    assert "raise max_tensor_body_bytes" in reply.inference_error


async def test_a_tensor_may_be_larger_than_other_requests(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_body_bytes=1000, max_tensor_body_bytes=20_000) as box:
        array = np.arange(2500, dtype=np.float32)
        tensor = {"name": "fp32", "shape": [2500], "datatype": "FP32", "parameters": {"binary_data_size": 10_000}}
        assert (await infer(box, {"inputs": [tensor]}, array.tobytes())).status == 200
        assert (await box.ask("POST", PATH, body=b"x" * 20_001)).status == 413
        assert (await box.ask("POST", "/v2/repository/index", body=b"x" * 1001)).status == 413


@pytest.mark.parametrize("size", [1, 65_536, 3 * 1024 * 1024 + 1])
async def test_large_binary_data_comes_through_whole_in_slices(box: ScriptedBox, size: int) -> None:
    array = np.random.default_rng(0).random(size, np.float32)
    tensor = {**BINARY_INPUT, "shape": [size], "parameters": {"binary_data_size": 4 * size}}
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    for _ in range(2):
        _, data = binary_of(await infer(box, document, array.tobytes()))
        assert data == array.tobytes()
    given = box.tensors.requests[0].inputs[0].array
    assert given.__array_interface__["data"][0] % 64 == 0
    assert not given.flags.owndata


async def test_a_body_in_pieces_and_the_next_request_behind_it(box: ScriptedBox) -> None:
    """What comes with the head goes the usual way, the rest into the buffer; a pipelined request must not."""
    array = np.arange(200_000, dtype=np.float32)
    tensor = {**BINARY_INPUT, "shape": [200_000], "parameters": {"binary_data_size": 800_000}}
    text = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nInference-Header-Content-Length: {len(text)}\r\n"
    message = f"{head}Content-Length: {len(text) + 800_000}\r\n\r\n".encode() + text + array.tobytes()
    async with wire(box) as peer:
        for begin, end in ((0, 300), (300, 500_000), (500_000, len(message))):
            await peer.send(message[begin:end])
            await asyncio.sleep(0)
        await peer.send(message)
        for _ in range(2):
            assert (await peer.read_reply()).json()["outputs"][0]["data"] == array.tolist()


async def test_a_body_without_a_length(box: ScriptedBox) -> None:
    text = json.dumps({"inputs": [TENSOR]}).encode()
    async with wire(box) as peer:
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        await peer.send(head.encode() + b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text))
        assert (await peer.read_reply()).json()["outputs"][0]["data"] == [1.5, 2, 3, 4]


async def test_a_large_body_that_comes_too_slowly_is_given_up(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, body_timeout_s=0.2) as box, wire(box) as peer:
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
        await peer.send(head.encode() + b" " * 100_000)
        reply = await peer.read_reply()
        assert reply.status == 400
        assert "100000 bytes had come" in reply.inference_error


async def test_a_client_that_leaves_in_its_body_is_forgotten(box: ScriptedBox) -> None:
    async with wire(box) as peer:
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
        await peer.send(head.encode() + b" " * 100_000)
    await until(lambda: 'route="/v2/models/{model}/infer",status="499"' in box.metrics.render().decode())
    assert (await infer(box, {"inputs": [TENSOR]})).status == 200


async def test_leaving_ends_the_work(box: ScriptedBox) -> None:
    box.tensors.gate = asyncio.Event()
    async with wire(box) as peer:
        await peer.send(post(PATH, {"inputs": [TENSOR]}))
        await box.tensors.waiting.wait()
    await box.tensors.cancelled.wait()


async def test_expect_100_continue(box: ScriptedBox) -> None:
    message = post(PATH, {"inputs": [TENSOR]}, "Expect: 100-continue")
    head, _, body = message.partition(b"\r\n\r\n")
    async with wire(box) as peer:
        await peer.send(head + b"\r\n\r\n")
        assert (await peer.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await peer.send(body)
        assert (await peer.read_reply()).status == 200


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_request(box: ScriptedBox, encoding: str, pack: Any) -> None:
    text = json.dumps({"inputs": [BINARY_INPUT]}).encode()
    headers = {"content-encoding": encoding, "inference-header-content-length": str(len(text))}
    reply = await box.ask("POST", PATH, body=pack(text + FLOATS.tobytes()), headers=headers)
    assert reply.json()["outputs"][0]["data"] == [1.5, 2, 3, 4]


@pytest.mark.parametrize(
    ("body", "encoding", "status", "problem"),
    [
        (b"no gzip", "gzip", 400, "cannot be decompressed"),
        (gzip.compress(b"x" * 100)[:-4], "gzip", 400, "ends before"),
        (gzip.compress(b"{}") + b"x", "gzip", 400, "something behind"),
        (gzip.compress(bytes(5000)), "gzip", 413, "more than 4000 bytes"),
        (b"x", "br", 415, "compressed ('br'). Send it as it is, or deflate, or gzip."),
    ],
)
async def test_a_compressed_request_that_will_not_do(
    tmp_path: Path, body: bytes, encoding: str, status: int, problem: str
) -> None:
    async with scripted_box(tmp_path, max_tensor_body_bytes=4000) as box:
        reply = await box.ask("POST", PATH, body=body, headers={"content-encoding": encoding})
        assert reply.status == status
        assert problem in reply.inference_error


async def test_large_tensors_are_converted_in_threads_and_the_same(
    box: ScriptedBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_module, "IN_THREAD_BYTES", 10)
    monkeypatch.setattr(infer_module, "IN_THREAD_ELEMENTS", 1)
    assert (await infer(box, {"inputs": [TENSOR]})).json()["outputs"][0]["data"] == [1.5, 2, 3, 4]
    box.tensors.now = card_of(Datatype.BOOL)
    flags = {"name": "bool", "shape": [400], "datatype": "BOOL", "parameters": {"binary_data_size": 400}}
    monkeypatch.setattr(infer_module, "IN_THREAD_BYTES", 300)
    reply = await infer(box, {"inputs": [flags]}, b"\1" * 400)
    assert reply.json()["outputs"][0]["data"] == [True] * 400


async def test_outputs_come_in_the_order_that_was_asked_for(box: ScriptedBox) -> None:
    box.tensors.now = card_of(Datatype.FP32, Datatype.INT8)
    box.tensors.answer = lambda request: [Tensor(name, Datatype.INT8, np.zeros(1, np.int8)) for name in request.outputs]
    document = {"inputs": [TENSOR], "outputs": [{"name": "int8"}, {"name": "fp32"}]}
    assert [each["name"] for each in (await infer(box, document)).json()["outputs"]] == ["int8", "fp32"]


def test_many_large_bodies_together_are_refused() -> None:
    budget = BodyBudget(10_000_000)
    refused = pytest.raises(OverloadedError, match="20000000 bytes")
    with budget.hold(20_000_000), budget.hold(1000), refused, budget.hold(2_000_000):
        pass
    with budget.hold(6_000_000), budget.hold(4_000_000), pytest.raises(OverloadedError), budget.hold(2_000_000):
        pass
    with budget.hold(10_000_000):
        pass
