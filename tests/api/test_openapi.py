"""The OpenAPI document, and the server held against it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import anyio
import msgspec
import pytest

from appliance.api.app import create_app
from appliance.api.openai.chat import ChatCompletionRequest
from appliance.api.openai.completions import CompletionRequest
from appliance.api.openai.tokenize import tokenize_request
from appliance.core.clock import SystemClock
from appliance.observe.metrics import Metrics
from appliance.security.keys import KeyStore
from appliance.store.database import Database
from appliance.web.wire import convert
from tests.api.boxes import Box, ScriptedBox, real_box, scripted_box, settings_with
from tests.api.scripted import ScriptedClassifiers, ScriptedEmbedding, ScriptedHealth, ScriptedModels, ScriptedTuning
from tests.api.scripted_retrieval import ScriptedFiles, ScriptedStores
from tests.api.scripted_tensors import ScriptedTensors

SCHEMATHESIS_TIMEOUT_S = 100.0

DOCUMENTS = "^/v1/(files|vector_stores|conversations|responses)"
RESPONSES = "^/v1/responses"
CONVERSATIONS = "^/v1/conversations"


async def document_of(box: Box, headers: dict[str, str] | None = None) -> dict[str, Any]:
    document: dict[str, Any] = (await box.ask("GET", "/openapi.json", headers=headers)).json()
    return document


def references(value: Any) -> set[str]:
    """Return every `$ref` in a document."""
    if isinstance(value, dict):
        inner = set().union(*(references(each) for each in value.values()))
        return inner | ({value["$ref"]} if isinstance(value.get("$ref"), str) else set())
    return set().union(*(references(each) for each in value)) if isinstance(value, list) else set()


def resolve(document: dict[str, Any], reference: str) -> Any:
    found: Any = document
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def test_every_route_of_the_application_is_in_the_document_and_no_other(tmp_path: Path) -> None:
    database = Database(tmp_path / "appliance.db")
    try:
        app = create_app(
            settings=settings_with(tmp_path),
            text_models=ScriptedModels(),
            embedding_models=ScriptedEmbedding(),
            classifiers=ScriptedClassifiers(),
            tensor_models=ScriptedTensors(),
            files=ScriptedFiles(),
            vector_stores=ScriptedStores(ScriptedFiles()),
            conversations=cast("Any", None),
            batches=cast("Any", None),
            agents=cast("Any", None),
            tunable_models=ScriptedTuning(),
            versions=cast("Any", None),
            keys=KeyStore(database, SystemClock()),
            metrics=Metrics(),
            health=ScriptedHealth(),
        )
    finally:
        database.close()
    assert {route.path for route in app.routes} == {  # type: ignore[attr-defined]
        "/v1/models",
        "/v1/models/{model}",
        "/v1/models/{model}/runtime",
        "/v1/models/{model}/version",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/classify",
        "/v1/tokenize",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/vector_stores",
        "/v1/vector_stores/{vector_store_id}",
        "/v1/vector_stores/{vector_store_id}/rebuild",
        "/v1/vector_stores/{vector_store_id}/reembed",
        "/v1/vector_stores/{vector_store_id}/verify",
        "/v1/vector_stores/{vector_store_id}/search",
        "/v1/vector_stores/{vector_store_id}/files",
        "/v1/vector_stores/{vector_store_id}/files/{file_id}",
        "/v1/vector_stores/{vector_store_id}/files/{file_id}/content",
        "/v1/vector_stores/{vector_store_id}/file_batches",
        "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}",
        "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/cancel",
        "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/files",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/cancel",
        "/v1/conversations",
        "/v1/conversations/search",
        "/v1/conversations/import",
        "/v1/conversations/{conversation_id}",
        "/v1/conversations/{conversation_id}/fork",
        "/v1/conversations/{conversation_id}/export",
        "/v1/conversations/{conversation_id}/items",
        "/v1/conversations/{conversation_id}/items/{item_id}",
        "/mcp",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/stats",
        "/v2/models/{model}",
        "/v2/models/{model}/versions/{version}",
        "/v2/models/{model}/ready",
        "/v2/models/{model}/versions/{version}/ready",
        "/v2/models/{model}/stats",
        "/v2/models/{model}/versions/{version}/stats",
        "/v2/models/{model}/infer",
        "/v2/models/{model}/versions/{version}/infer",
        "/v2/repository/index",
        "/v2/repository/models/{model}/load",
        "/v2/repository/models/{model}/unload",
        "/health",
        "/health/live",
        "/metrics",
        "/openapi.json",
    }


@pytest.mark.anyio
async def test_the_document_is_whole(box: ScriptedBox) -> None:
    document = await document_of(box)
    assert document["openapi"] == "3.1.0"
    assert len(document["paths"]) == 61
    for reference in references(document):
        assert resolve(document, reference)
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert len({each["operationId"] for each in operations}) == len(operations)
    for operation in operations:
        assert {"200", "400", "500", "503"} <= set(operation["responses"])
        assert "security" not in operation


@pytest.mark.anyio
async def test_every_example_is_a_request_that_works(box: ScriptedBox) -> None:
    document = await document_of(box)
    checks: dict[str, Any] = {
        "/v1/chat/completions": lambda value: convert(value, ChatCompletionRequest),
        "/v1/completions": lambda value: convert(value, CompletionRequest),
        "/v1/tokenize": tokenize_request,
    }
    for path in ("/v1/embeddings", "/v1/rerank", "/v1/classify"):
        examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            assert (await box.ask("POST", path, {**example["value"], "model": "tiny"})).status == 200
    for path, check in checks.items():
        examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
        assert len(examples) == 2
        for example in examples.values():
            assert check(example["value"]).model == "smollm2-135m-instruct"
            reply = await box.ask("POST", path, {**example["value"], "model": "tiny"})
            assert reply.status == 200


@pytest.mark.anyio
async def test_limits_that_are_settings_are_in_the_document(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_choices=3) as box:
        schemas = (await document_of(box))["components"]["schemas"]
        for name in ("ChatCompletionRequest", "CompletionRequest"):
            assert schemas[name]["properties"]["n"]["anyOf"][0]["maximum"] == 3
            assert schemas[name]["additionalProperties"] is False
        assert "Not supported" in schemas["ChatCompletionRequest"]["properties"]["functions"]["description"]
        assert "ignored" in schemas["ChatCompletionRequest"]["properties"]["user"]["description"]


@pytest.mark.anyio
async def test_where_keys_are_required_the_document_says_so(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        _, secret = box.keys.create("reader", ["inference"])
        document = await document_of(box, {"authorization": f"Bearer {secret}"})
    for path, operations in document["paths"].items():
        for operation in operations.values():
            public = path.startswith(("/health", "/v2/health"))
            assert ("security" in operation) is not public
            assert ("401" in operation["responses"]) is not public


async def run_schemathesis(document: dict[str, Any], box: Box, folder: Path, *arguments: str) -> None:
    """Hold a server against its document, with models that exist so that requests get past the look-up."""
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema["properties"]:
            optional = [] if "model" in schema["required"] else [None]
            schema["properties"]["model"] = {"enum": ["tiny", "tiny:1", *optional]}
    for name, operations in document["paths"].items():
        for parameter in [each for one in operations.values() for each in one.get("parameters", ())]:
            if name.startswith("/v2"):
                parameter["schema"] = {"enum": {"model": ["echo"], "version": ["2"]}[parameter["name"]]}
    path = folder / "openapi.json"
    path.write_bytes(msgspec.json.encode(document))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", box.url, "--no-color"),
        *("--seed", "1", "--generation-deterministic", *arguments),
    ]
    with anyio.fail_after(SCHEMATHESIS_TIMEOUT_S):
        result = await anyio.run_process(command, cwd=folder, check=False)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_server_does_what_the_document_says_and_nothing_else(tmp_path: Path) -> None:
    """Not at /mcp, whose protocol no OpenAPI document tells: the SDK's client speaks it in test_mcp.py."""
    async with scripted_box(tmp_path, deadline_s=SCHEMATHESIS_TIMEOUT_S, model="tiny", max_choices=4) as box:
        others = f"/mcp$|/infer$|/ready$|/unload$|/chat/completions$|/tokenize$|{DOCUMENTS}"
        arguments = ("--checks", "all", "--exclude-path-regex", others, "--max-examples", "10")
        await run_schemathesis(await document_of(box), box, tmp_path, *arguments)


@pytest.mark.slow
@pytest.mark.anyio
async def test_documents_do_what_the_document_says(tmp_path: Path) -> None:
    """Valid data may be refused here: no schema says which conditions go together, or which files there are."""
    async with scripted_box(tmp_path, deadline_s=SCHEMATHESIS_TIMEOUT_S) as box:
        document = await document_of(box)
        store = box.stores.create(tenant="").id
        for name, operations in document["paths"].items():
            for parameter in [each for one in operations.values() for each in one.get("parameters", ())]:
                if parameter["name"] == "vector_store_id" and name != "/v1/vector_stores/{vector_store_id}":
                    parameter["schema"] = {"enum": [store]}
        checks = "positive_data_acceptance,ensure_resource_availability"
        arguments = ("--checks", "all", "--exclude-checks", checks, "--max-examples", "10")
        await run_schemathesis(
            document, box, tmp_path, *arguments, "--include-path-regex", "^/v1/(files|vector_stores)"
        )


@pytest.mark.slow
@pytest.mark.anyio
async def test_conversations_do_what_the_document_says(tmp_path: Path) -> None:
    """Valid data may be refused here: no schema says which items a conversation has."""
    async with scripted_box(tmp_path, deadline_s=SCHEMATHESIS_TIMEOUT_S) as box:
        made = (await box.ask("POST", "/v1/conversations", {"items": [{"role": "user", "content": "Hi"}]})).json()
        document = await document_of(box)
        for name, operations in document["paths"].items():
            for parameter in [each for one in operations.values() for each in one.get("parameters", ())]:
                if parameter["name"] == "conversation_id" and name.endswith(("items", "fork", "export")):
                    parameter["schema"] = {"enum": [made["id"]]}
        checks = "positive_data_acceptance,ensure_resource_availability"
        arguments = ("--checks", "all", "--exclude-checks", checks, "--max-examples", "5")
        await run_schemathesis(document, box, tmp_path, *arguments, "--include-path-regex", CONVERSATIONS)


@pytest.mark.slow
@pytest.mark.anyio
async def test_responses_do_what_the_document_says(tmp_path: Path) -> None:
    """Valid data may be refused here: no schema says which fields go together, or which types of tools there are."""
    async with scripted_box(tmp_path, deadline_s=SCHEMATHESIS_TIMEOUT_S) as box:
        made = (await box.ask("POST", "/v1/responses", {"model": "tiny", "input": "Hi", "stream": True})).body
        name = made.partition(b'"id":"')[2].partition(b'"')[0].decode()
        document = await document_of(box)
        for operations in document["paths"].values():
            for method, one in operations.items():
                for parameter in one.get("parameters", ()):
                    if parameter["name"] == "response_id" and method == "get":
                        parameter["schema"] = {"enum": [name]}
        checks = "positive_data_acceptance,ensure_resource_availability"
        arguments = ("--checks", "all", "--exclude-checks", checks, "--max-examples", "8")
        await run_schemathesis(document, box, tmp_path, *arguments, "--include-path-regex", RESPONSES)


@pytest.mark.slow
@pytest.mark.anyio
async def test_chat_does_what_the_document_says(tmp_path: Path) -> None:
    """Valid data may be refused here: no schema says that a result needs a call before it, or that names differ."""
    async with scripted_box(tmp_path, deadline_s=SCHEMATHESIS_TIMEOUT_S, model="tiny", max_choices=4) as box:
        arguments = ("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--max-examples", "10")
        await run_schemathesis(
            await document_of(box), box, tmp_path, *arguments, "--include-path-regex", "/chat/completions$|/tokenize$"
        )


@pytest.mark.slow
@pytest.mark.anyio
async def test_inference_does_what_the_document_says(tmp_path: Path) -> None:
    """Valid data may be refused here: no schema says how many elements a shape has, or when a model is ready."""
    async with scripted_box(tmp_path, deadline_s=SCHEMATHESIS_TIMEOUT_S) as box:
        arguments = ("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--max-examples", "20")
        document = await document_of(box)
        await run_schemathesis(document, box, tmp_path, *arguments, "--include-path-regex", "/infer$|/ready$|/unload$")


@pytest.mark.slow
@pytest.mark.anyio
async def test_no_request_brings_down_a_real_engine(tmp_path: Path, tiny_model_path: Path) -> None:
    """Valid data may be refused here: no schema knows the vocabulary's size or how many tokens a text has."""
    async with real_box(tmp_path, tiny_model_path, deadline_s=SCHEMATHESIS_TIMEOUT_S) as box:
        checks = ("--checks", "all", "--exclude-checks", "positive_data_acceptance")
        arguments = (*checks, "--include-method", "POST", "--exclude-path-regex", DOCUMENTS, "--max-examples", "5")
        await run_schemathesis(await document_of(box), box, tmp_path, *arguments)
        assert (await box.chat(max_tokens=3)).status == 200


@pytest.mark.slow
@pytest.mark.anyio
async def test_no_door_opens_without_the_key_that_the_document_asks_for(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, deadline_s=SCHEMATHESIS_TIMEOUT_S, model="tiny", require_api_key=True) as box:
        assert box.keys is not None
        _, secret = box.keys.create("everything", ["admin"])
        header = f"Authorization: Bearer {secret}"
        document = await document_of(box, {"authorization": f"Bearer {secret}"})
        await run_schemathesis(
            document, box, tmp_path, "--checks", "all", "--include-method", "GET", "--max-examples", "5", "-H", header
        )
