"""Chunks on the wire."""

from __future__ import annotations

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.api.openai.answers import Heading
from appliance.api.openai.chat import ChatChunk, ChatChunkChoice, ChatDelta
from appliance.api.openai.stream import ChunkPattern
from appliance.core.types import FinishReason

MARK = '"choices":[]'


@given(st.text(), st.text(), st.booleans())
@example(MARK, MARK, True)
@example("\\", '"', False)
def test_a_chunk_made_from_the_pattern_is_the_chunk_encoded_as_a_whole(name: str, text: str, usage: bool) -> None:
    head = Heading(id=name, created=1, model=name, service_tier="default", system_fingerprint=name)
    same = {**head.fields(), **({"usage": None} if usage else {})}
    pattern = ChunkPattern(ChatChunk(**same, choices=[]))
    for choice in (
        ChatChunkChoice(0, ChatDelta(content=text)),
        ChatChunkChoice(1, ChatDelta(), None, FinishReason.STOP),
    ):
        whole = msgspec.json.encode(ChatChunk(**same, choices=[choice]))
        assert pattern.event(choice) == b"data: " + whole + b"\n\n"
