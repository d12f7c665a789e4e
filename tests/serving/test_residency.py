"""Loading and unloading a model by name."""

from __future__ import annotations

import asyncio

import pytest

from appliance.core.errors import ConflictError, NotFoundError
from appliance.serving.residency import ModelResidency
from tests.serving.conftest import Box, serving

pytestmark = pytest.mark.anyio


async def test_a_model_is_loaded_and_unloaded_by_its_name(box: Box) -> None:
    async with serving(box) as floor:
        memory = ModelResidency(box.registry, floor.models, floor.tensors)
        await memory.load("tiny")
        assert floor.models.names == {"tiny:1"}
        async with asyncio.timeout(10):
            while floor.models._working:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)
        await memory.unload("tiny:1")
        assert floor.models.names == frozenset()
        await memory.unload("tiny")  # it is not loaded, and stays so


async def test_a_model_in_use_is_not_unloaded(box: Box) -> None:
    async with serving(box) as floor:
        memory = ModelResidency(box.registry, floor.models, floor.tensors)
        async with floor.models.lease("tiny"):
            with pytest.raises(ConflictError, match="in use"):
                await memory.unload("tiny")
            assert floor.models.names == {"tiny:1"}


async def test_the_model_of_the_settings_is_not_unloaded(box: Box) -> None:
    async with serving(box, model="tiny") as floor:
        memory = ModelResidency(box.registry, floor.models, floor.tensors)
        await memory.load("tiny")
        with pytest.raises(ConflictError, match="stays loaded"):
            await memory.unload("tiny")


async def test_what_is_not_there_is_neither_loaded_nor_unloaded(box: Box) -> None:
    async with serving(box) as floor:
        memory = ModelResidency(box.registry, floor.models, floor.tensors)
        with pytest.raises(NotFoundError):
            await memory.load("absent")
        with pytest.raises(NotFoundError):
            await memory.unload("absent")
