"""What the measurements ask for, and what they find in the answers."""

from __future__ import annotations

from typing import Any

import msgspec

from appliance.bench.client import ConnectionLostError, Response, ask

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_TOPICS = ("rivers", "bread", "trains", "the moon", "glass", "bees", "harbours", "paper", "bridges", "salt", "snow")
_FILLER = "The keeper of the lighthouse wrote down wind, waves and every ship that passed, and then he slept. "


def question(number: int) -> list[dict[str, str]]:
    """Return the messages of a short chat; each number gives another."""
    topic = _TOPICS[number % len(_TOPICS)]
    return [{"role": "user", "content": f"Tell me in detail, as story {number}, all about {topic}."}]


def chat(model: str, number: int, tokens: int) -> dict[str, Any]:
    """Return a streaming request for an answer of exactly `tokens` tokens."""
    return {"messages": question(number), **exactly(model, tokens)}


def completion(model: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Return the same for token ids without a chat template."""
    return {"prompt": prompt, **exactly(model, tokens)}


def exactly(model: str, tokens: int) -> dict[str, Any]:
    """Return the fields that ask for a streamed answer of exactly `tokens` tokens, always the same one."""
    return {
        "model": model,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def chat_tokens(port: int, model: str, number: int) -> list[int]:
    """Return the token ids that the server makes of the messages of `question`.

    Raises:
        ConnectionLostError: It does not answer with them.
    """
    answer = await ask(port, "POST", "/v1/tokenize", {"model": model, "messages": question(number)})
    return list(answer.json()["tokens"])


async def filler_tokens(port: int, model: str, number: int, count: int) -> list[int]:
    """Return `count` token ids of plain text; each number gives a text that begins differently.

    Raises:
        ConnectionLostError: The server does not answer with them.
    """
    text = f"{number}: "
    while True:
        text += _FILLER * (1 + count // 20)
        answer = await ask(port, "POST", "/v1/tokenize", {"model": model, "prompt": text})
        tokens = answer.json()["tokens"]
        if len(tokens) >= count:
            return list(tokens[:count])


async def context_length(port: int, model: str) -> int:
    """Return how many tokens a prompt and its answer may have together.

    Raises:
        ConnectionLostError: The server does not say.
    """
    answer = await ask(port, "GET", f"/v1/models/{model}")
    return int(answer.json()["context_length"])


def text_times(response: Response) -> list[float]:
    """Return when each event with text of the answer came, for a chat or a completion."""
    return [at for at, data in response.events() if data != b"[DONE]" and _has_text(msgspec.json.decode(data))]


def answer_text(response: Response) -> str:
    """Return the text of a streamed answer, for a chat or a completion."""
    chunks = [msgspec.json.decode(data) for _, data in response.events() if data != b"[DONE]"]
    return "".join(_text(choice) for chunk in chunks for choice in chunk.get("choices", ()))


def usage(response: Response) -> dict[str, Any]:
    """Return what a streamed answer says of its tokens; empty if it says nothing."""
    chunks = [msgspec.json.decode(data) for _, data in response.events() if data != b"[DONE]"]
    return next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), {})


def first_token_s(response: Response) -> float:
    """Return the seconds from sending a request to the first text of its answer.

    Raises:
        ConnectionLostError: The answer has no text.
    """
    times = text_times(response)
    if not times:
        raise ConnectionLostError(f"An answer has no text; its status is {response.status}.")
    return times[0] - response.sent_at


def check_complete(response: Response, tokens: int) -> None:
    """Make sure that a streamed answer is whole and has exactly `tokens` tokens.

    Raises:
        ConnectionLostError: It is not; the message says how it ended.
    """
    fault = incompleteness(response, tokens)
    if fault:
        raise ConnectionLostError(f"An answer of {tokens} tokens was expected: {fault}")


def incompleteness(response: Response, tokens: int) -> str:
    """Return what a streamed answer of exactly `tokens` tokens lacks, or nothing."""
    if response.status != 200:
        return f"the status is {response.status}: {response.body[:300].decode(errors='replace')}"
    events = [data for _, data in response.events()]
    if not events or events[-1] != b"[DONE]":
        return "the stream has no [DONE]"
    generated = usage(response).get("completion_tokens", 0)
    return "" if generated == tokens else f"it has {generated} tokens"


def _has_text(chunk: Any) -> bool:
    return any(_text(choice) for choice in chunk.get("choices", ()))


def _text(choice: Any) -> str:
    return choice.get("text") or choice.get("delta", {}).get("content") or ""
