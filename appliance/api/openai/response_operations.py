"""The routes of responses."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.api.openai.responses import ItemsQuery, ResponseResource, RetrieveQuery
from appliance.api.openai.responses_wire import (
    CreateResponseRequest,
    DeletedResponse,
    ResponseEvent,
    ResponseItemList,
    ResponseObject,
)
from appliance.core.agents import Agents
from appliance.core.settings import Settings
from appliance.web.routes import Operation

RESPONSES = "/v1/responses"
RESPONSE = f"{RESPONSES}/{{response_id}}"
_PARAMETERS = {"response_id": "Id of a response, `resp_…`"}


def response_operations(settings: Settings, agents: Agents) -> Sequence[Operation]:
    """Return the routes of responses."""
    resource = ResponseResource(agents, settings)
    model = settings.model or "smollm2-135m-instruct"
    return (
        Operation(
            method="POST",
            path=RESPONSES,
            operation_id="createResponse",
            summary="Answer a turn, calling tools as needed",
            handler=resource.create,
            access="inference",
            request=(CreateResponseRequest,),
            examples={
                "question": {"model": model, "input": "What is a heat pump?", "max_output_tokens": 64},
                "stream": {
                    "model": model,
                    "instructions": "You answer in one sentence.",
                    "input": [{"role": "user", "content": "用一句话解释热泵。"}],
                    "stream": True,
                    "store": False,
                },
            },
            response=ResponseObject,
            stream=ResponseEvent,
            errors=(404, 409, 429),
        ),
        Operation(
            method="GET",
            path=RESPONSE,
            operation_id="getResponse",
            summary="Show a response, or take up its stream again",
            handler=resource.retrieve,
            access="inference",
            parameters=_PARAMETERS,
            query=RetrieveQuery,
            response=ResponseObject,
            stream=ResponseEvent,
            errors=(404,),
        ),
        Operation(
            method="DELETE",
            path=RESPONSE,
            operation_id="deleteResponse",
            summary="Erase a response",
            handler=resource.delete,
            access="inference",
            parameters=_PARAMETERS,
            response=DeletedResponse,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path=f"{RESPONSE}/cancel",
            operation_id="cancelResponse",
            summary="End a background response",
            handler=resource.cancel,
            access="inference",
            parameters=_PARAMETERS,
            response=ResponseObject,
            errors=(404,),
        ),
        Operation(
            method="GET",
            path=f"{RESPONSE}/input_items",
            operation_id="listInputItems",
            summary="List the items that a response answers",
            handler=resource.input_items,
            access="inference",
            parameters=_PARAMETERS,
            query=ItemsQuery,
            response=ResponseItemList,
            errors=(404,),
        ),
    )
