"""The official client, `tritonclient[http]`, from end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio.to_thread
import ml_dtypes
import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from appliance.api.oip.datatypes import DTYPES
from appliance.core.tensors import Datatype
from appliance.core.types import Priority
from tests.api.boxes import ScriptedBox
from tests.api.scripted_tensors import card_of

pytestmark = pytest.mark.anyio


async def with_client(box: ScriptedBox, ask: Callable[[Any], Any]) -> Any:
    """Return what a function gets from the client; it blocks, so it runs in a thread."""

    def work() -> Any:
        with InferenceServerClient(f"127.0.0.1:{box.port}", network_timeout=20, connection_timeout=20) as client:
            return ask(client)

    return await anyio.to_thread.run_sync(work)


def sample(datatype: Datatype) -> np.ndarray[Any, Any]:
    if datatype is Datatype.BYTES:
        return np.array([["a", "二"], ["", "d"]], np.object_)
    return np.array([[1, 0], [1, 1]]).astype(DTYPES[datatype])


def tensor(name: str, array: np.ndarray[Any, Any], *, binary: bool) -> InferInput:
    found = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    found.set_data_from_numpy(array, binary_data=binary)
    return found


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", list(Datatype))
async def test_every_datatype_comes_back_as_it_went(box: ScriptedBox, datatype: Datatype, binary: bool) -> None:
    box.tensors.now = card_of(datatype)
    only_binary = datatype in (Datatype.FP16, Datatype.BF16)
    array = sample(datatype)
    name = datatype.lower()

    def ask(client: Any) -> Any:
        outputs = None if binary else [InferRequestedOutput(name, binary_data=only_binary)]
        return client.infer("echo", [tensor(name, array, binary=binary or only_binary)], outputs=outputs)

    found = (await with_client(box, ask)).as_numpy(name)
    assert found.shape == array.shape
    if datatype is Datatype.BYTES:
        found = np.array([[each.decode() if isinstance(each, bytes) else each for each in row] for row in found])
    assert found.tolist() == array.tolist()


async def test_what_a_request_may_say(box: ScriptedBox) -> None:
    array = sample(Datatype.FP32)

    def ask(client: Any) -> Any:
        return client.infer(
            "echo",
            [tensor("fp32", array, binary=True)],
            model_version="2",
            request_id="r-1",
            outputs=[InferRequestedOutput("fp32", binary_data=True, class_count=1)],
            priority=1,
            timeout=1_000_000,
        )

    result = await with_client(box, ask)
    assert result.get_response()["id"] == "r-1"
    assert result.as_numpy("fp32").tolist() == [[b"1.000000:0"], [b"1.000000:0"]]
    [request] = box.tensors.requests
    assert (request.version, request.priority, request.deadline_s) == ("2", Priority.PRIORITY, 1.0)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_compression_may_be_asked_for(box: ScriptedBox, algorithm: str) -> None:
    array = np.arange(50_000, dtype=np.float32).reshape(2, -1)

    def ask(client: Any) -> Any:
        return client.infer(
            "echo",
            [tensor("fp32", array, binary=True)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )

    assert np.array_equal((await with_client(box, ask)).as_numpy("fp32"), array)


async def test_what_the_server_says_of_itself(box: ScriptedBox) -> None:
    def ask(client: Any) -> list[Any]:
        return [
            client.is_server_live(),
            client.is_server_ready(),
            client.is_model_ready("echo"),
            client.is_model_ready("echo", "1"),
            client.get_server_metadata()["name"],
            client.get_model_metadata("echo", "2")["inputs"][0]["datatype"],
            client.get_inference_statistics()["model_stats"][0]["name"],
            client.get_inference_statistics("echo", "2")["model_stats"][0]["version"],
            [each["state"] for each in client.get_model_repository_index()],
        ]

    assert await with_client(box, ask) == [
        *(True, True, True, False, "appliance", "FP32", "echo", "2"),
        ["UNAVAILABLE", "READY"],
    ]


async def test_unload_and_load(box: ScriptedBox) -> None:
    def ask(client: Any) -> list[bool]:
        client.unload_model("echo")
        before = client.is_model_ready("echo")
        client.load_model("echo")
        return [before, client.is_model_ready("echo")]

    assert await with_client(box, ask) == [False, True]


async def test_errors_reach_the_client_as_text(box: ScriptedBox) -> None:
    def ask(client: Any) -> Any:
        with pytest.raises(InferenceServerException) as refusal:
            client.infer("echo", [tensor("fp32", sample(Datatype.FP32), binary=True)], sequence_id=5)
        return refusal.value

    error = await with_client(box, ask)
    assert error.status() == "400"
    assert "sequences are not supported" in error.message()


async def test_bfloat16_is_bfloat16(box: ScriptedBox) -> None:
    box.tensors.now = card_of(Datatype.BF16)
    array = np.array([[1.5, -2]], ml_dtypes.bfloat16)
    result = await with_client(box, lambda client: client.infer("echo", [tensor("bf16", array, binary=True)]))
    assert result.as_numpy("bf16").dtype == ml_dtypes.bfloat16
    assert box.tensors.requests[0].inputs[0].array.dtype == ml_dtypes.bfloat16
