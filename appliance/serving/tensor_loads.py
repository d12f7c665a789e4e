"""The wish that an ONNX model be loaded, and how requests wait for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from appliance.core.errors import ApplianceError
from appliance.registry.known import RegisteredModel
from appliance.serving.tensor_loader import LoadedTensorModel


@dataclass(eq=False, slots=True)
class Load:
    """A wish for a model.

    Attributes:
        waiting: Requests that wait for it; each holds a lease from the moment it is loaded.
        begun: A task is at it.
        beside: Nothing is unloaded for it.
    """

    registered: RegisteredModel
    done: asyncio.Future[LoadedTensorModel] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    waiting: int = 0
    begun: bool = False
    beside: bool = False

    def succeed(self, model: LoadedTensorModel) -> None:
        """Answer those who wait, and lease it to each."""
        if not self.done.done():
            model.take(self.waiting)
            self.done.set_result(model)

    def fail(self, error: ApplianceError) -> None:
        """Answer those who wait with an error, unless they are answered."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # nobody need be waiting any more


async def waited_for(load: Load) -> LoadedTensorModel:
    """Wait until it is loaded, and hold a lease then; leaving leaves the load to the others."""
    load.waiting += 1
    try:
        return await asyncio.shield(load.done)
    except asyncio.CancelledError:
        if load.done.done() and load.done.exception() is None:
            load.done.result().give_back()
        load.waiting -= 1
        raise
