"""ONNX models in a server process: the official clients, beside chats, through faults, to an orderly end."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests import tiny_onnx
from tests.journeys.processes import DEADLINE_S, ServerProcess, appliance, server_process, wait_until
from tests.tiny_encoders import write_tiny_classifier, write_tiny_cross_encoder, write_tiny_encoder

pytestmark = pytest.mark.slow

FAILING = Path(__file__).with_name("failing_session.py")
FEATURES = np.linspace(-1, 1, 3 * tiny_onnx.TABULAR_FEATURES, dtype=np.float32).reshape(3, -1)
ONE_THREAD = {"APPLIANCE_ONNX_THREADS": "1"}


def bring_in(data: Path, path: Path, name: str) -> None:
    done = appliance("models", "import", str(path), "--name", name, "--licence", "MIT", data=data)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """Return a data folder with the chat model `tiny` and the model of tensors `table`."""
    bring_in(tiny_data, tiny_onnx.tabular(tmp_path / "table.onnx"), "table")
    return tiny_data


@contextmanager
def triton(server: ServerProcess) -> Iterator[Any]:
    with InferenceServerClient(
        f"127.0.0.1:{server.port}", network_timeout=DEADLINE_S, connection_timeout=DEADLINE_S
    ) as client:
        yield client


def tensor(name: str, array: Any, *, binary: bool = True) -> InferInput:
    found = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def probabilities(client: Any, *, binary: bool = True, version: str = "") -> Any:
    wanted = [InferRequestedOutput("probabilities", binary_data=binary)]
    given = [tensor("features", FEATURES, binary=binary)]
    return client.infer("table", given, model_version=version, outputs=wanted).as_numpy("probabilities")


def test_tritonclient_asks_loads_infers_and_unloads(data: Path, tmp_path: Path) -> None:
    with server_process(data, tmp_path, "--model", "", environment=ONE_THREAD) as server:
        server.wait_until_ready()
        with triton(server) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            metadata = client.get_model_metadata("table")
            assert [(each["name"], each["datatype"], each["shape"]) for each in metadata["inputs"]] == [
                ("features", "FP32", [-1, 4])
            ]
            assert not client.is_model_ready("table")
            as_binary, as_json = probabilities(client), probabilities(client, binary=False)
            assert as_binary.shape == (3, 3)
            assert as_binary.sum(axis=1) == pytest.approx([1, 1, 1])
            assert as_json == pytest.approx(as_binary)
            assert client.is_model_ready("table")
            [statistics] = client.get_inference_statistics("table")["model_stats"]
            assert (statistics["name"], statistics["inference_count"]) == ("table", 6)
            [index] = client.get_model_repository_index()
            assert (index["name"], index["state"]) == ("table", "READY")
            refused = appliance("models", "remove", "table", "--yes", data=data)
            assert refused.returncode != 0
            assert "in use" in refused.stderr
            client.unload_model("table")
            assert not client.is_model_ready("table")
            client.load_model("table")
            assert client.is_model_ready("table")
            with pytest.raises(InferenceServerException, match="there are: table"):
                client.infer("nobody", [tensor("features", FEATURES)])
            with pytest.raises(InferenceServerException, match="GGUF"):
                client.infer("tiny", [tensor("features", FEATURES)])
            with pytest.raises(InferenceServerException, match="features"):
                client.infer("table", [tensor("features", FEATURES.astype(np.float64))])
        assert server.end() == 0
        assert "unloaded table:1" in server.log


def test_a_running_server_sees_what_the_command_line_brings_and_takes(data: Path, tmp_path: Path) -> None:
    with server_process(data, tmp_path, "--model", "", environment=ONE_THREAD) as server, triton_of(server) as client:
        old = probabilities(client)
        bring_in(data, tiny_onnx.tabular(tmp_path / "new.onnx", seed=1), "table")
        new = probabilities(client)
        assert not np.allclose(old, new)
        assert probabilities(client, version="1") == pytest.approx(old)
        assert client.get_model_metadata("table")["versions"] == ["1", "2"]
        client.unload_model("table")
        assert appliance("models", "remove", "table:2", "--yes", data=data).returncode == 0
        assert probabilities(client) == pytest.approx(old)
        with pytest.raises(InferenceServerException, match="no version '2'"):
            probabilities(client, version="2")


@contextmanager
def triton_of(server: ServerProcess) -> Iterator[Any]:
    server.wait_until_ready()
    with triton(server) as client:
        yield client


def test_the_openai_package_embeds_reranks_and_classifies_while_a_chat_streams(tiny_data: Path, tmp_path: Path) -> None:
    bring_in(tiny_data, write_tiny_encoder(tmp_path / "vectors"), "vectors")
    bring_in(tiny_data, write_tiny_cross_encoder(tmp_path / "cross"), "cross")
    bring_in(tiny_data, write_tiny_classifier(tmp_path / "classes"), "classes")
    texts = ["the pump stops", "why is the motor hot", "水泵停止"]
    environment = {**ONE_THREAD, "APPLIANCE_EMBEDDING_MODEL": "vectors"}
    with server_process(tiny_data, tmp_path, "--model", "tiny", environment=environment) as server:
        server.wait_until_ready()
        with server.client() as client:
            kinds = {each.id: (each.to_dict()["kind"], each.to_dict()["task"]) for each in client.models.list()}
            assert kinds["vectors"] == ("onnx", "embedding")
            assert kinds["cross"] == ("onnx", "rerank")
            assert kinds["classes"] == ("onnx", "classification")
            whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=60, temperature=0)
            stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=60, temperature=0, stream=True)
            pieces = [next(stream).choices[0].text]
            for _ in range(3):
                told = client.embeddings.create(model="vectors", input=texts)
                assert all(math.hypot(*each.embedding) == pytest.approx(1, abs=1e-5) for each in told.data)
            ask = {"query": "why does the pump stop", "documents": texts}
            cross = client.post("/rerank", body={"model": "cross", **ask}, cast_to=object)
            assert cross["method"] == "cross-encoder"  # type: ignore[index]
            compared = client.post("/rerank", body=ask, cast_to=object)
            assert (compared["method"], compared["model"]) == ("embedding", "vectors:1")  # type: ignore[index]
            sorted_ = client.post("/classify", body={"model": "classes", "input": texts}, cast_to=object)
            assert len(sorted_["data"]) == 3  # type: ignore[index]
            pieces += [chunk.choices[0].text for chunk in stream]
            assert "".join(pieces) == whole.choices[0].text
            with pytest.raises(openai.BadRequestError, match="writes no text"):
                client.chat.completions.create(model="cross", messages=[{"role": "user", "content": "hello"}])
            with pytest.raises(openai.BadRequestError, match="cannot embed"):
                client.embeddings.create(model="classes", input="hello")
        with triton(server) as client:
            assert client.is_model_ready("vectors")
            ids = np.array([[2, 5, 3]])
            given = [tensor("input_ids", ids), tensor("attention_mask", ids**0), tensor("token_type_ids", ids * 0)]
            assert client.infer("vectors", given).as_numpy("last_hidden_state").shape == (1, 3, 32)
        assert server.end() == 0


def test_a_session_that_dies_takes_nothing_else_with_it(data: Path, tmp_path: Path) -> None:
    bring_in(data, tiny_onnx.two_inputs(tmp_path / "pair.onnx"), "pair")
    fault = {**ONE_THREAD, "AFTER": "3", "FAILURE": "die", "APPLIANCE_CIRCUIT_OPEN_S": "0.5"}
    with (
        server_process(data, tmp_path, "--model", "tiny", script=FAILING, environment=fault) as server,
        triton_of(server) as client,
    ):
        refusals: list[str] = []

        def answered() -> bool:
            try:
                return bool(probabilities(client).size)
            except InferenceServerException as refusal:
                refusals.append(refusal.status())
                return False

        wait_until(lambda: not answered(), lambda: server.log)
        one = np.ones((1, 2), np.float32)
        assert client.infer("pair", [tensor("a", one), tensor("b", one)]).as_numpy("sum").tolist() == [[2, 2]]
        assert server.client().completions.create(model="tiny", prompt="Hello", max_tokens=2).choices
        assert server.get("/health")[0] == 200
        assert not answered()
        wait_until(answered, lambda: server.log)
        assert set(refusals) <= {"500", "503"}
        assert "503" in refusals
        assert server.end() == 0


def test_a_session_that_hangs_turns_readiness_red_and_names_itself(data: Path, tmp_path: Path) -> None:
    fault = {**ONE_THREAD, "AFTER": "2", "FAILURE": "hang", "APPLIANCE_STALLED_ENGINE_S": "1"}
    with (
        server_process(data, tmp_path, "--model", "", script=FAILING, environment=fault) as server,
        ThreadPoolExecutor(1) as threads,
    ):
        server.wait_until_ready()

        def ask() -> None:
            body = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
            for _ in range(3):
                server.pool.request("POST", f"{server.url}/v2/models/table/infer", json=body)

        threads.submit(ask)
        wait_until(lambda: server.get("/health")[0] == 503, lambda: server.log)
        assert "session of table:1 does not answer" in json.loads(server.get("/health")[1])["reason"]
        server.process.kill()


def test_sigterm_lets_tensors_finish_and_a_killed_server_starts_again(data: Path, tmp_path: Path) -> None:
    bring_in(data, tiny_onnx.slow(tmp_path / "slow.onnx", rounds=40_000), "slow")
    with server_process(data, tmp_path, "--model", "", environment=ONE_THREAD) as server:
        server.wait_until_ready()
        with triton(server) as client:
            client.load_model("slow")
        server.end(signal.SIGKILL)

    def ask() -> Any:
        with triton(server) as client:
            return client.infer("slow", [tensor("x", np.ones((64, 256), np.float32))]).as_numpy("y")

    with (
        server_process(data, tmp_path, "--model", "", environment=ONE_THREAD) as server,
        ThreadPoolExecutor(1) as threads,
    ):
        server.wait_until_ready()
        answer = threads.submit(ask)
        wait_until(lambda: server.metric("appliance_num_requests_running") == 1, lambda: server.log)
        assert server.end() == 0
        assert answer.result(DEADLINE_S).shape == (64, 256)
