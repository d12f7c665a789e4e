"""`GET /v1/models`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.api.openai.models import model_responses
from appliance.core.types import ModelCard
from tests.api.boxes import ScriptedBox

CARD = ModelCard(
    name="tiny",
    version="1",
    kind="gguf",
    task="chat",
    created=100,
    size=7,
    licence="MIT",
    context_length=512,
    loaded=False,
)


def test_a_version_is_part_of_the_id_only_where_it_must_be() -> None:
    cards = [CARD, replace(CARD, version="2", created=200), replace(CARD, name="other")]
    assert [each.id for each in model_responses(cards)] == ["tiny:1", "tiny:2", "other"]


@pytest.mark.anyio
async def test_a_name_means_its_newest_version(box: ScriptedBox, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [CARD, replace(CARD, version="2", created=200)]
    monkeypatch.setattr(box.models, "cards", lambda: cards)
    for wanted, version in (("tiny", "2"), ("tiny:1", "1"), ("tiny%3A2", "2")):
        reply = await box.ask("GET", f"/v1/models/{wanted}")
        assert reply.json()["version"] == version
    reply = await box.ask("GET", "/v1/models/none")
    assert reply.status == 404
    assert "tiny:1, tiny:2" in reply.error["message"]
    assert reply.error["code"] == "model_not_found"


@pytest.mark.anyio
async def test_adapters_are_listed_behind_their_base_and_found_by_each_name(
    box: ScriptedBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = replace(CARD, version="2")
    cards = [CARD, replace(CARD, adapter="legal", kind="lora"), second, replace(second, adapter="terse", kind="lora")]
    monkeypatch.setattr(box.models, "cards", lambda: cards)
    listed = (await box.ask("GET", "/v1/models")).json()["data"]
    assert [(each["id"], each["base"], each["kind"], each["owned_by"]) for each in listed] == [
        ("tiny:1", None, "gguf", "appliance"),
        ("tiny:legal", "tiny:1", "lora", "appliance"),
        ("tiny:2", None, "gguf", "appliance"),
        ("tiny:terse", "tiny:2", "lora", "appliance"),
    ]
    for wanted in ("tiny:legal", "tiny:1:legal"):
        reply = await box.ask("GET", f"/v1/models/{wanted}")
        assert (reply.json()["id"], reply.json()["base"]) == (wanted, "tiny:1")
    for unknown in ("legal", "tiny:2:legal", "tiny:1:legal:x"):
        reply = await box.ask("GET", f"/v1/models/{unknown}")
        assert reply.status == 404
        assert "tiny:1, tiny:legal, tiny:2, tiny:terse" in reply.error["message"]
    both = [*cards, replace(second, adapter="legal", kind="lora")]
    assert [each.id for each in model_responses(both)][1::3] == ["tiny:1:legal", "tiny:2:legal"]


@pytest.mark.anyio
async def test_an_empty_box_says_so(box: ScriptedBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box.models, "cards", list)
    assert (await box.ask("GET", "/v1/models")).json() == {"object": "list", "data": []}
    reply = await box.ask("GET", "/v1/models/tiny")
    assert "there is none" in reply.error["message"]
    assert "models pull" in reply.error["message"]
