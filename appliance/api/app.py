"""The application: the table of routes, and the layers that every request passes.

From the outside in: the limits of bodies, the boundary (request id, errors, log, metrics), the guard against foreign
web pages, the router, the API key, the handler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.middleware import Middleware
from starlette.routing import Router

from appliance.api.body_limits import limit_of
from appliance.api.health import Observation
from appliance.api.mcp.door import mcp_operations
from appliance.api.oip.operations import inference_operations
from appliance.api.openai.batches import batch_operations
from appliance.api.openai.chat import ChatChunk, ChatCompletion, ChatCompletionRequest, ChatCompletions
from appliance.api.openai.classify import ClassificationList, ClassifyRequest, ClassifyResource
from appliance.api.openai.completions import Completion, CompletionRequest, Completions
from appliance.api.openai.conversation_operations import conversation_operations
from appliance.api.openai.embeddings import EmbeddingList, EmbeddingResource, EmbeddingsRequest
from appliance.api.openai.models import ModelList, ModelResponse, Models
from appliance.api.openai.rerank import RerankingRequest, RerankResource, RerankResponse
from appliance.api.openai.response_operations import response_operations
from appliance.api.openai.retrieval_operations import retrieval_operations
from appliance.api.openai.tokenize import Tokenize, TokenizeChatRequest, TokenizeResponse, TokenizeTextRequest
from appliance.api.openapi import openapi_document
from appliance.api.runtime import Runtime, RuntimeChangeRequest, RuntimeResponse
from appliance.api.versions import VersionRequest, VersionResponse, Versions
from appliance.observe.metrics import Metrics
from appliance.web.auth import Authenticator
from appliance.web.boundary import RequestBoundary
from appliance.web.browsers import BrowserGuard
from appliance.web.health import HealthResponse, answer_live
from appliance.web.limits import BodyLimits
from appliance.web.openapi import Document
from appliance.web.routes import Operation, no_such_path, starlette_routes

if TYPE_CHECKING:
    from appliance.core.agents import Agents
    from appliance.core.batches import Batches
    from appliance.core.encoders import TextClassifiers
    from appliance.core.retrieval import Files, VectorStores
    from appliance.core.sessions import Conversations
    from appliance.core.settings import Settings
    from appliance.core.tensors import TensorModels
    from appliance.core.types import EmbeddingModels, HealthSource, TextModels, TunableModels
    from appliance.core.wishes import ModelVersions
    from appliance.web.auth import Keys

GENERATION_ERRORS = (404, 429)


def create_app(
    *,
    settings: Settings,
    text_models: TextModels,
    embedding_models: EmbeddingModels,
    classifiers: TextClassifiers,
    tensor_models: TensorModels,
    files: Files,
    vector_stores: VectorStores,
    agents: Agents,
    conversations: Conversations,
    batches: Batches,
    tunable_models: TunableModels,
    versions: ModelVersions,
    keys: Keys,
    metrics: Metrics,
    health: HealthSource,
) -> Router:
    """Return the ASGI application.

    A router with our layers is all there is: Starlette's class of that name would add two more, for errors that the
    boundary has answered, and every token would pass them.

    Args:
        settings: Limits, and whether API keys are required.
        text_models: What answers completions.
        embedding_models: What embeds.
        classifiers: What reranks and classifies.
        tensor_models: What turns tensors into tensors.
        files: What was uploaded.
        vector_stores: What can be searched.
        agents: What answers `/v1/responses`.
        conversations: What was said.
        batches: What is worked off offline.
        tunable_models: What can be changed while it runs.
        versions: Which versions names mean.
        keys: The API keys.
        metrics: Counts requests and is read by `/metrics`.
        health: What `/health` says.
    """
    authenticator = Authenticator(settings, keys)
    document = Document(lambda: openapi_document(operations, settings, keys_required=authenticator.required))
    operations = (  # routes are tried in turn, so what is asked for most often in a second comes first
        *inference_operations(settings, tensor_models, health),
        *encoder_operations(settings, embedding_models, classifiers),
        *openai_operations(settings, text_models, conversations),
        *retrieval_operations(settings, files, vector_stores),
        *response_operations(settings, agents),
        *conversation_operations(conversations),
        *mcp_operations(settings, text_models, vector_stores),
        *batch_operations(batches),
        *admin_operations(tunable_models, versions),
        *box_operations(Observation(health, metrics), document),
    )
    return Router(
        routes=starlette_routes(operations, authenticator),
        redirect_slashes=False,  # a redirected POST loses its body in many clients
        default=no_such_path,
        middleware=[
            Middleware(BodyLimits, settings, lambda path: limit_of(path, settings)),
            Middleware(RequestBoundary, metrics),
            Middleware(BrowserGuard, settings, authenticator),
        ],
    )


def openai_operations(settings: Settings, text_models: TextModels, conversations: Conversations) -> Sequence[Operation]:
    """Return the routes of the OpenAI API."""
    models = Models(text_models)
    model = settings.model or "smollm2-135m-instruct"
    return (
        Operation(
            method="GET",
            path="/v1/models",
            operation_id="listModels",
            summary="List the registered models",
            handler=models.list,
            access="inference",
            response=ModelList,
        ),
        Operation(
            method="GET",
            path="/v1/models/{model}",
            operation_id="retrieveModel",
            summary="Show one model",
            handler=models.retrieve,
            access="inference",
            parameters={"model": "`name` or `name:version`"},
            response=ModelResponse,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path="/v1/chat/completions",
            operation_id="createChatCompletion",
            summary="Answer a conversation",
            handler=ChatCompletions(text_models, conversations, settings).create,
            access="inference",
            request=(ChatCompletionRequest,),
            examples={
                "question": {"model": model, "messages": [{"role": "user", "content": "What is a heat pump?"}]},
                "stream": {
                    "model": model,
                    "messages": [
                        {"role": "system", "content": "You answer in one sentence."},
                        {"role": "user", "content": "用一句话解释热泵。"},
                    ],
                    "max_completion_tokens": 64,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            },
            response=ChatCompletion,
            stream=ChatChunk,
            errors=GENERATION_ERRORS,
        ),
        Operation(
            method="POST",
            path="/v1/completions",
            operation_id="createCompletion",
            summary="Continue texts",
            handler=Completions(text_models, settings).create,
            access="inference",
            request=(CompletionRequest,),
            examples={
                "text": {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
                "texts": {"model": model, "prompt": ["One, two,", "Red, green,"], "max_tokens": 4, "logprobs": 2},
            },
            response=Completion,
            stream=Completion,
            errors=GENERATION_ERRORS,
        ),
        Operation(
            method="POST",
            path="/v1/tokenize",
            operation_id="tokenize",
            summary="Show a prompt as the engine would read it",
            handler=Tokenize(text_models, settings).create,
            access="inference",
            request=(TokenizeTextRequest, TokenizeChatRequest),
            examples={
                "text": {"model": model, "prompt": "Heat pumps move heat.", "return_token_strs": True},
                "chat": {"model": model, "messages": [{"role": "user", "content": "Hello"}]},
            },
            response=TokenizeResponse,
            errors=GENERATION_ERRORS,
        ),
    )


def encoder_operations(
    settings: Settings, embedding_models: EmbeddingModels, classifiers: TextClassifiers
) -> Sequence[Operation]:
    """Return the routes of models that read texts and write none."""
    query = {"query": "What moves heat?", "documents": ["A heat pump moves heat.", "用一句话解释热泵。"]}
    model = settings.model or "smollm2-135m-instruct"
    return (
        Operation(
            method="POST",
            path="/v1/embeddings",
            operation_id="createEmbedding",
            summary="Turn texts into vectors",
            handler=EmbeddingResource(embedding_models, settings).create,
            access="inference",
            request=(EmbeddingsRequest,),
            examples={
                "text": {"model": model, "input": "A heat pump moves heat."},
                "texts": {"model": model, "input": ["A heat pump", "用一句话解释热泵。"], "encoding_format": "base64"},
            },
            response=EmbeddingList,
            errors=GENERATION_ERRORS,
        ),
        Operation(
            method="POST",
            path="/v1/rerank",
            operation_id="rerank",
            summary="Order documents by how well they answer a query",
            handler=RerankResource(classifiers, settings).create,
            access="inference",
            request=(RerankingRequest,),
            examples={"all": query, "best": {"model": model, **query, "top_n": 1, "return_documents": True}},
            response=RerankResponse,
            errors=GENERATION_ERRORS,
        ),
        Operation(
            method="POST",
            path="/v1/classify",
            operation_id="classify",
            summary="Find the labels of texts",
            handler=ClassifyResource(classifiers, settings).create,
            access="inference",
            request=(ClassifyRequest,),
            examples={
                "text": {"model": "sentiment", "input": "I like it."},
                "texts": {"model": "sentiment", "input": ["I like it.", "It broke."], "truncate": True},
            },
            response=ClassificationList,
            errors=GENERATION_ERRORS,
        ),
    )


def admin_operations(tunable_models: TunableModels, versions: ModelVersions) -> Sequence[Operation]:
    """Return the routes that change how the box works."""
    runtime, wished = Runtime(tunable_models), Versions(versions)
    named = {"model": "`name` of a model, without a version"}
    path, parameters = "/v1/models/{model}/runtime", {"model": "`name` or `name:version` of a loaded model"}
    return (
        Operation(
            method="GET",
            path=path,
            operation_id="showRuntime",
            summary="Show what a loaded model runs with",
            handler=runtime.show,
            access="admin",
            parameters=parameters,
            response=RuntimeResponse,
            errors=(404,),
        ),
        Operation(
            method="PATCH",
            path=path,
            operation_id="changeRuntime",
            summary="Change what a loaded model runs with, until it is unloaded",
            handler=runtime.change,
            access="admin",
            parameters=parameters,
            request=(RuntimeChangeRequest,),
            examples={"threads": {"threads": 2}, "latency": {"target_inter_token_latency_s": 0.1}},
            response=RuntimeResponse,
            errors=(404,),
        ),
        Operation(
            method="GET",
            path="/v1/models/{model}/version",
            operation_id="showVersion",
            summary="Show which version a model's name means, and how its trial goes",
            handler=wished.show,
            access="admin",
            parameters=named,
            response=VersionResponse,
            errors=(404,),
        ),
        Operation(
            method="PATCH",
            path="/v1/models/{model}/version",
            operation_id="changeVersion",
            summary="Let a model's name mean another version, on trial at first, or the one before",
            handler=wished.change,
            access="admin",
            parameters=named,
            request=(VersionRequest,),
            response=VersionResponse,
            errors=(404, 409),
        ),
    )


def box_operations(observation: Observation, document: Document) -> Sequence[Operation]:
    """Return the routes about the box itself."""
    return (
        Operation(
            method="GET",
            path="/health",
            operation_id="health",
            summary="Whether requests can be answered now",
            handler=observation.ready,
            access=None,
            response=HealthResponse,
            other_responses={503: HealthResponse},
        ),
        Operation(
            method="GET",
            path="/health/live",
            operation_id="live",
            summary="Whether the process runs",
            handler=answer_live,
            access=None,
            response=HealthResponse,
        ),
        Operation(
            method="GET",
            path="/metrics",
            operation_id="metrics",
            summary="Figures for Prometheus",
            handler=observation.metrics,
            access="metrics",
            media_type="text/plain",
        ),
        Operation(
            method="GET",
            path="/openapi.json",
            operation_id="openapi",
            summary="This document",
            handler=document.get,
            access="inference",
        ),
    )
