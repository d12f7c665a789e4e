"""The tools that the box offers to MCP clients: what they are called, what they take, and what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from appliance.agents.citations import written
from appliance.api.choices import Choices
from appliance.api.openai.sampling import check_prompt_length
from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.core.retrieval import Hit, SearchRequest, VectorStores
from appliance.core.settings import Settings
from appliance.core.types import ChatMessage, GenerationRequest, ModelCard, SamplingParams, TextModels
from appliance.web.wire import convert

MOST_STORES = 8


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Finds passages in the documents on this box, by words and by meaning."""

    query: Annotated[str, Meta(min_length=1, max_length=4096, description="What to look for")]
    vector_store_ids: Annotated[
        list[str] | None,
        Meta(description=f"Stores to search; without it the first {MOST_STORES} that there are"),
    ] = None
    max_num_results: Annotated[int, Meta(ge=1, le=50, description="Most passages")] = 5


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks a language model on this box."""

    question: Annotated[str, Meta(min_length=1, description="What to ask")]
    model: Annotated[str | None, Meta(description="A model of list_models; without it the box's own choice")] = None
    instructions: Annotated[str | None, Meta(description="How to answer")] = None
    max_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=2**31 - 1)] | None, Meta(description="Longest answer in tokens")
    ] = None


class ListModels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Lists the models on this box."""


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf, as the key says."""

    tenant: str = ""
    weight: float = 1.0
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tool came to: a text for the model that asked, and the same as data."""

    text: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BoxTools:
    """Carries out calls. Every method raises ApplianceError."""

    settings: Settings
    models: TextModels
    stores: VectorStores

    @property
    def kinds(self) -> Mapping[str, type[msgspec.Struct]]:
        """Return the tools by name, each with the type of its arguments."""
        return {"search": Search, "ask": Ask, "list_models": ListModels}

    async def call(self, name: str, arguments: Mapping[str, Any], caller: Caller) -> Outcome:
        """Carry out one call."""
        kind = self.kinds.get(name)
        if kind is None:
            raise NotFoundError(f"There is no tool {name[:64]!r}.", advice=f"There are {', '.join(self.kinds)}.")
        match convert(dict(arguments), kind):
            case Search() as wanted:
                return await self._search(wanted, caller)
            case Ask() as wanted:
                return await self._ask(wanted, caller)
            case _:
                return self._list_models()

    async def _search(self, wanted: Search, caller: Caller) -> Outcome:
        if wanted.vector_store_ids is None:
            stores, _ = self.stores.list(tenant=caller.tenant, limit=MOST_STORES, after="", newest_first=True)
            names: Sequence[str] = [each.id for each in stores]
        else:
            names = tuple(dict.fromkeys(wanted.vector_store_ids))
        if len(names) > MOST_STORES:
            raise InvalidRequestError(f"{len(names)} stores are too many; {MOST_STORES} are searched at once.")
        hits: list[Hit] = []
        for name in names:
            request = SearchRequest(
                store=name,
                queries=(wanted.query,),
                tenant=caller.tenant,
                limit=wanted.max_num_results,
                deadline_s=self.settings.tool_timeout_s,
                request_id=caller.request_id,
            )
            hits += (await self.stores.search(request)).hits
        best = sorted(hits, key=lambda hit: -hit.score)[: wanted.max_num_results]
        passages = [
            {"file_id": each.file, "filename": each.filename, "score": each.score, "page": each.page, "text": each.text}
            for each in best
        ]
        return Outcome(written(best, 1), {"passages": passages})

    async def _ask(self, wanted: Ask, caller: Caller) -> Outcome:
        for text in (wanted.question, wanted.instructions or ""):
            check_prompt_length(len(text), self.settings, "question")
        system = [ChatMessage("system", wanted.instructions)] if wanted.instructions else []
        request = GenerationRequest(
            model=wanted.model or self._default_model(),
            prompt=(*system, ChatMessage("user", wanted.question)),
            sampling=SamplingParams(max_tokens=wanted.max_tokens),
            tenant=caller.tenant,
            weight=caller.weight,
            deadline_s=self.settings.request_timeout_s,
            request_id=caller.request_id,
        )
        choices = await Choices.accept(self.models, [request])
        (whole,) = await choices.collect()
        return Outcome(whole.text, {"model": choices.model, "answer": whole.text})

    def _default_model(self) -> str:
        """Return the model that the box starts with, else one that is loaded, else any."""
        if self.settings.model:
            return self.settings.model
        cards = sorted((each for each in self.models.cards() if _chats(each)), key=lambda card: not card.loaded)
        if not cards:
            raise NotFoundError("There is no model on this box that answers questions.", advice="Install one.")
        return f"{cards[0].name}:{cards[0].version}"

    def _list_models(self) -> Outcome:
        cards = self.models.cards()
        models = [
            {"id": _name(each), "task": each.task, "context_length": each.context_length, "loaded": each.loaded}
            for each in cards
        ]
        lines = [f"{each['id']} ({each['task']}{', loaded' if each['loaded'] else ''})" for each in models]
        return Outcome("\n".join(lines) or "There are none.", {"models": models})


def _chats(card: ModelCard) -> bool:
    return card.task == "chat" and not card.adapter


def _name(card: ModelCard) -> str:
    return f"{card.name}:{card.adapter}" if card.adapter else f"{card.name}:{card.version}"
