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
    cards = [replace(CARD, version="2", created=200), CARD]
    monkeypatch.setattr(box.models, "cards", lambda: cards)
    for wanted, version in (("tiny", "2"), ("tiny:1", "1"), ("tiny%3A2", "2")):
        reply = await box.ask("GET", f"/v1/models/{wanted}")
        assert reply.json()["version"] == version
    reply = await box.ask("GET", "/v1/models/none")
    assert reply.status == 404
    assert "tiny:2, tiny:1" in reply.error["message"]
    assert reply.error["code"] == "model_not_found"


@pytest.mark.anyio
async def test_an_empty_box_says_so(box: ScriptedBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box.models, "cards", list)
    assert (await box.ask("GET", "/v1/models")).json() == {"object": "list", "data": []}
    reply = await box.ask("GET", "/v1/models/tiny")
    assert "there is none" in reply.error["message"]
    assert "models pull" in reply.error["message"]
