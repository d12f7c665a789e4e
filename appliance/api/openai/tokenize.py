"""`POST /v1/tokenize`: how the engine would read a prompt. The shape is that of vLLM's `/tokenize`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.messages import Messages, chat_messages
from appliance.api.openai.sampling import ModelName, check_prompt_length
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.types import Prompt, TextModels
from appliance.web.body import read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import Text, convert, meaning


class TokenizeFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both forms have."""

    model: Annotated[ModelName, meaning("A registered model, `name` or `name:version`, or an adapter, `name:adapter`")]
    add_special_tokens: Annotated[bool | None, meaning("Add the model's start token; true unless given")] = None
    return_token_strs: Annotated[bool | None, meaning("Return each token's text too")] = None


class TokenizeTextRequest(TokenizeFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text to tokenize."""

    prompt: Text


class TokenizeChatRequest(TokenizeFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Messages to render with the model's chat template and to tokenize."""

    messages: Messages


class TokenizeResponse(msgspec.Struct, frozen=True):
    """The prompt's tokens.

    Attributes:
        count: How many there are.
        max_model_len: Tokens that a prompt and its answer may have together, 0 when unknown.
        tokens: Their ids.
        token_strs: Their texts, or null; part of a character shows as U+FFFD.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Tokenize:
    """The resource."""

    def __init__(self, models: TextModels, settings: Settings) -> None:
        self._models = models
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Answer with the tokens of a prompt.

        Raises:
            ApplianceError: The request will not do, or as `TextModels.tokenize`.
        """
        fields = await read_json(request, tokenize_request)
        request.scope["state"]["model"] = fields.model
        prompt: Prompt
        if isinstance(fields, TokenizeTextRequest):
            check_prompt_length(len(fields.prompt), self._settings, "prompt")
            prompt = fields.prompt
        else:
            prompt = chat_messages(fields.messages, self._settings)
        add_special = fields.add_special_tokens is not False
        # Control tokens in a text count as such, as they do in a text to complete.
        work = self._models.tokenize(fields.model, prompt, add_special=add_special, parse_special=True)
        limit_s = self._settings.request_timeout_s
        tokenization = await until_disconnected(request.receive, work, limit_s=limit_s)
        response = TokenizeResponse(
            count=len(tokenization.tokens),
            max_model_len=tokenization.context_length,
            tokens=list(tokenization.tokens),
            token_strs=[piece.decode(errors="replace") for piece in tokenization.pieces]
            if fields.return_token_strs
            else None,
        )
        return Response(msgspec.json.encode(response), media_type="application/json")


def tokenize_request(document: Any) -> TokenizeTextRequest | TokenizeChatRequest:
    """Return the request in the one of its two forms that the document has.

    Raises:
        InvalidRequestError: It has both `prompt` and `messages`, or is wrong in another way.
    """
    if not isinstance(document, dict) or "messages" not in document:
        return convert(document, TokenizeTextRequest)
    if "prompt" in document:
        raise InvalidRequestError(
            "Send either 'prompt' or 'messages', not both.", param="messages", code="invalid_value"
        )
    return convert(document, TokenizeChatRequest)
