"""A serving floor over a real registry with tiny models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.core.types import Delta, Generation
from appliance.engine.cpu_budget import CpuBudget
from appliance.observe.metrics import Metrics
from appliance.registry.install import import_model
from appliance.registry.install_onnx import import_onnx
from appliance.registry.versions import Registry, open_registry
from appliance.registry.wishes import Wishes
from appliance.serving.floor import ServingFloor
from appliance.store.database import Database
from tests import tiny_onnx
from tests.deltas import deltas_of
from tests.tiny_gguf import write_tiny_bert, write_tiny_llama

DEADLINE_S = 30.0


class Box:
    """Settings, database, registry and the folder they are in.

    Attributes:
        context_length: Of the models that are added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context_length = 512
        self.database = Database(folder / "appliance.db")
        self.settings = Settings(
            data_dir=folder,
            model="",
            context_cells=512,
            max_sequences=4,
            batch_tokens=64,
            threads=1,
            onnx_threads=1,
            embedding_cache_bytes=0,
        )
        self.registry: Registry = open_registry(self.settings, self.database)
        self.wishes = Wishes(self.database, self.registry)

    def add(self, name: str, *, seed: int = 0, chat_template: str | None = "default") -> None:
        template = {} if chat_template == "default" else {"chat_template": chat_template}
        path = self.folder / f"{name}-{seed}.gguf"
        write_tiny_llama(path, seed=seed, context_length=self.context_length, **template)  # type: ignore[arg-type]
        self.add_file(name, path)

    def add_file(self, name: str, path: Path) -> None:
        import_model(path, self.registry, name=name, licence="Apache-2.0")

    def add_encoder(self, name: str, *, seed: int = 0) -> None:
        path = write_tiny_bert(self.folder / f"{name}-{seed}.gguf", seed=seed)
        import_model(path, self.registry, name=name, licence="Apache-2.0")

    def add_tensors(self, name: str, write: Callable[..., Path] = tiny_onnx.tabular, **options: object) -> None:
        """Register one more version of an ONNX model."""
        folder = self.folder / f"{name}-{len(self.registry.list())}"
        folder.mkdir()
        self.add_onnx(name, write(folder / "model.onnx", **options))

    def add_onnx(self, name: str, path: Path) -> None:
        import_onnx(path, self.registry, name=name, licence="Apache-2.0")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    subject = Box(tmp_path)
    subject.add("tiny")
    yield subject
    subject.database.close()


@asynccontextmanager
async def serving(box: Box, **changes: object) -> AsyncIterator[ServingFloor]:
    settings = replace(box.settings, **changes)  # type: ignore[arg-type]
    floor = ServingFloor(settings, box.registry, box.wishes, Metrics(), CpuBudget(2))
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(run()) for run in floor.runs.values()]
        try:
            yield floor
        finally:
            for each in running:
                each.cancel()
            await floor.close()


async def text_of(generation: Generation) -> str:
    deltas: list[Delta] = [delta async for delta in deltas_of(generation)]
    return "".join(delta.text for delta in deltas)
