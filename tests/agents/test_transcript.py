"""What stands for turns that are left out, in the messages that a model reads."""

from __future__ import annotations

from appliance.agents.transcript import with_notes
from appliance.core.types import ChatMessage

SYSTEM, USER, ASSISTANT = (ChatMessage(each, each) for each in ("system", "user", "assistant"))


def roles(messages: tuple[ChatMessage, ...]) -> list[str]:
    return [each.role for each in messages]


def test_notes_go_into_the_first_and_the_newest_message_of_the_user() -> None:
    noted = with_notes([SYSTEM, USER, ASSISTANT, USER], "a summary", ["a memory"])
    assert roles(noted) == ["system", "user", "assistant", "user"]
    assert "a summary" in noted[1].content
    assert "a memory" in noted[3].content
    assert noted[3].content.endswith("user")


def test_notes_are_messages_of_their_own_where_the_user_has_none() -> None:
    noted = with_notes([SYSTEM, ASSISTANT], "a summary", ["a memory"])
    assert roles(noted) == ["system", "user", "assistant", "user"]
    assert "a summary" in noted[1].content
    assert "a memory" in noted[3].content


def test_nothing_is_noted_where_there_is_nothing_to_note() -> None:
    assert with_notes([SYSTEM, USER], "", []) == (SYSTEM, USER)
