"""Chat messages become a prompt, by the template in the model file.

A template is somebody else's program, so it runs in a child process (`template_process`), one for each loaded model.
Whatever it does there, it costs at most its time limit and the child; the next prompt gets a fresh one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from appliance.core.errors import InvalidRequestError, ModelFileError, UnavailableError
from appliance.core.types import ChatMessage
from appliance.serving.template_child import MODEL_ADVICE, ChildDiedError, TemplateChild
from appliance.serving.template_protocol import Compile, Render, Reply, Segment, to_frame

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class PromptRenderer:
    """Renders one model's chat template, one conversation at a time."""

    def __init__(
        self,
        template: str,
        *,
        bos_token: str,
        eos_token: str,
        timeout_s: float,
        max_bytes: int,
        control_texts: Collection[str] = (),
    ) -> None:
        """Keep what is needed; nothing is started yet.

        Args:
            template: Jinja source from the model file.
            bos_token: Text of the token that begins a prompt. Templates write it themselves, so a rendered
                prompt is tokenized without adding it.
            eos_token: Text of the token that ends an answer.
            timeout_s: Longest time to compile, and to render one prompt.
            max_bytes: Largest prompt in UTF-8.
            control_texts: Texts of all control tokens of the vocabulary, for `render_segments`.
        """
        self._compile = Compile(template, bos_token, eos_token, list(control_texts), timeout_s, max_bytes)
        self._child: TemplateChild | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        """Start the child and compile the template.

        Raises:
            ModelFileError: The template cannot be compiled.
            UnavailableError: The child cannot be started.
        """
        async with self._lock:
            await self._ready_child()

    async def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] = _NOTHING,
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: The conversation.
            add_generation_prompt: End with the beginning of the assistant's answer.
            extra: Further variables for the template, as `tools` or `enable_thinking`.

        Raises:
            InvalidRequestError: The template refuses the conversation, in its own words.
            ModelFileError: The template fails, takes too long or writes too much.
            UnavailableError: The child cannot be started, or the renderer is closed.
        """
        wanted = _render_message(messages, add_generation_prompt, extra, protect=False)
        return "".join(text for text, _ in await self._render(wanted))

    async def render_segments(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] = _NOTHING,
    ) -> list[Segment]:
        """As `render`, with control tokens in messages kept apart from the template's own.

        Returns:
            The prompt in pieces, each with whether control tokens may be read in it; nearly always one piece. Where
            it is false, the text must be tokenized as plain text, lest a message end its own turn and begin another's.

        Raises:
            InvalidRequestError: Also: a message holds control tokens and the template rewrites it, so that they
                cannot be told apart.
        """
        return await self._render(_render_message(messages, add_generation_prompt, extra, protect=True))

    async def close(self) -> None:
        """End the child. Idempotent; waits for a prompt that is being rendered."""
        async with self._lock:
            self._closed = True
            await self._discard_child()

    async def _render(self, wanted: Render) -> list[Segment]:
        try:
            frame = to_frame(wanted)
        except (UnicodeEncodeError, TypeError, RecursionError) as error:
            raise InvalidRequestError(
                f"The messages hold something that is not text or plain data: {error}.", param="messages"
            ) from error
        async with self._lock:
            reply = await self._exchange_with_retry(frame)
        self._raise_problem(reply)
        return reply.segments

    async def _exchange_with_retry(self, frame: bytes) -> Reply:
        """Ask the child; if it was found dead though it had been well, ask a fresh one."""
        was_running = self._child is not None
        try:
            return await self._exchange(await self._ready_child(), frame)
        except ChildDiedError:
            if not was_running:
                raise
        return await self._exchange(await self._ready_child(), frame)

    async def _exchange(self, child: TemplateChild, frame: bytes) -> Reply:
        """Send one message and return its reply; on anything else the child is out of step, so it ends."""
        answered = False
        try:
            async with asyncio.timeout(self._compile.timeout_s):
                reply = await child.exchange(frame)
            answered = True
        except TimeoutError as error:
            raise ModelFileError(
                f"The model's chat template ran for more than {self._compile.timeout_s:g} s and was stopped.",
                advice=f"Raise template_timeout_s if the conversation is very long. {MODEL_ADVICE}",
                code="chat_template_timeout",
            ) from error
        finally:
            if not answered:
                await self._discard_child()
        return reply

    async def _ready_child(self) -> TemplateChild:
        if self._closed:
            raise UnavailableError("The model is being unloaded.", advice="Send the request again.", retry_after_s=1.0)
        if self._child is None:
            self._child = await TemplateChild.start(reply_limit=8 * self._compile.max_bytes + 4096)
            reply = await self._exchange(self._child, to_frame(self._compile))
            if reply.problem is not None:
                await self._discard_child()
                raise ModelFileError(
                    f"The model's chat template is not valid: {reply.message}.",
                    advice=MODEL_ADVICE,
                    code="bad_chat_template",
                )
        return self._child

    async def _discard_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    def _raise_problem(self, reply: Reply) -> None:
        match reply.problem:
            case "refused":
                raise InvalidRequestError(
                    f"The model's chat template refuses the conversation: {reply.message}",
                    code="chat_template_refused",
                    param="messages",
                )
            case "forged":
                raise InvalidRequestError(
                    f"The messages hold control tokens of the model, which could forge turns: {reply.message}.",
                    advice="Leave them out: the chat template rewrites messages, so they cannot be kept apart.",
                    code="control_tokens_in_messages",
                    param="messages",
                )
            case "too_large":
                raise ModelFileError(
                    f"The model's chat template wrote more than {self._compile.max_bytes} bytes.",
                    advice=f"Send less text, or raise max_rendered_bytes. {MODEL_ADVICE}",
                    code="chat_template_too_large",
                )
            case "failed":
                raise ModelFileError(
                    f"The model's chat template failed: {reply.message}.",
                    advice=MODEL_ADVICE,
                    code="chat_template_failed",
                )
            case None:
                return


def _render_message(
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool,
    extra: Mapping[str, Any],
    *,
    protect: bool,
) -> Render:
    plain = [{**message.extra, "role": message.role, "content": message.content} for message in messages]
    return Render(plain, add_generation_prompt, dict(extra), protect)
