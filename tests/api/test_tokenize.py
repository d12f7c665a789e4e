"""`POST /v1/tokenize`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.boxes import Box, ScriptedBox

pytestmark = pytest.mark.anyio


async def test_a_text_is_shown_as_tokens(box: ScriptedBox) -> None:
    box.models.begin_token = True
    reply = await box.ask("POST", "/v1/tokenize", {"model": "tiny", "prompt": "Hi", "return_token_strs": True})
    assert reply.json() == {"count": 3, "max_model_len": 4096, "tokens": [256, 72, 105], "token_strs": ["", "H", "i"]}


async def test_the_start_token_can_be_left_out(box: ScriptedBox) -> None:
    box.models.begin_token = True
    reply = await box.ask("POST", "/v1/tokenize", {"model": "tiny", "prompt": "Hi", "add_special_tokens": False})
    assert reply.json() == {"count": 2, "max_model_len": 4096, "tokens": [72, 105], "token_strs": None}


async def test_a_conversation_has_as_many_tokens_as_its_answer_counts(any_box: Box) -> None:
    messages = [{"role": "user", "content": "热泵?"}]
    shown = (await any_box.ask("POST", "/v1/tokenize", {"model": "tiny", "messages": messages})).json()
    assert shown["count"] == len(shown["tokens"]) > 0
    assert shown["max_model_len"] >= 256
    answer = (await any_box.chat("热泵?", max_tokens=1)).json()
    assert answer["usage"]["prompt_tokens"] == shown["count"]


async def test_a_text_has_as_many_tokens_as_its_completion_counts(any_box: Box) -> None:
    text = "<|im_start|>user\n热泵?<|im_end|>"
    shown = (await any_box.ask("POST", "/v1/tokenize", {"model": "tiny", "prompt": text})).json()
    assert (await any_box.complete(text, max_tokens=1)).json()["usage"]["prompt_tokens"] == shown["count"]


@pytest.mark.parametrize(
    ("document", "status", "param"),
    [
        ({"model": "tiny"}, 400, None),
        ({"model": "tiny", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "messages"),
        ({"model": "tiny", "messages": []}, 400, "messages"),
        ({"model": "tiny", "prompt": ["x"]}, 400, "prompt"),
        ({"model": "tiny", "prompt": "x", "stream": True}, 400, "stream"),
        ({"model": "none", "prompt": "x"}, 404, None),
        ([], 400, None),
    ],
)
async def test_a_wrong_request_is_refused(box: ScriptedBox, document: Any, status: int, param: str | None) -> None:
    reply = await box.ask("POST", "/v1/tokenize", document)
    assert (reply.status, reply.error["param"]) == (status, param)
