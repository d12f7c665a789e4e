"""An ONNX model is loaded: its files are held, laid out in a folder, opened in a session, and its tokenizer is read."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.core.tensors import Datatype
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.encoder import OnnxEncoder
from appliance.engine.onnx.engine import OnnxEngine
from appliance.observe.metrics import Metrics
from appliance.observe.resources import physical_cores
from appliance.registry.known import RegisteredModel
from appliance.registry.layout import lay_out, layout_name, remove_stale_layouts
from appliance.registry.versions import Registry
from appliance.serving.purposes import ONNX
from appliance.serving.soak import Record
from appliance.store.locks import Hold

LOGGER = logging.getLogger("appliance.serving")
TEXT_TASKS = ("embedding", "rerank", "classification")


@dataclass(eq=False, slots=True)
class LoadedTensorModel:
    """One ONNX model that is loaded.

    Attributes:
        text_encoder: Takes texts to the same session; None for a model of tensors alone.
        leases: Requests that use it.
        leaving: It is to be unloaded: nobody may begin to use it.
        ending: A task is at it.
        free: Set while nobody uses it.
        gone: Set when it is unloaded.
        taken_at: The loop's time when a request last came for it.
        record: What became of its requests.
    """

    registered: RegisteredModel
    engine: OnnxEngine
    text_encoder: OnnxEncoder | None
    hold: Hold
    leases: int = 0
    last_used: float = 0.0
    leaving: bool = False
    ending: bool = False
    free: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    taken_at: float = 0.0
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        self.take(0)

    @property
    def encoder(self) -> OnnxEncoder:
        """Return what takes texts to the session of a model that is for texts."""
        assert self.text_encoder is not None, "who asks has looked what the model is for"
        return self.text_encoder

    def take(self, leases: int = 1) -> None:
        """Keep it loaded for so many requests; each gives back once."""
        self.leases += leases
        self._note()
        self.taken_at = self.last_used

    def give_back(self) -> None:
        """Let it be unloaded, as far as one request is concerned."""
        self.leases -= 1
        self._note()

    def _note(self) -> None:
        self.last_used = asyncio.get_running_loop().time()
        if self.leases:
            self.free.clear()
        else:
            self.free.set()


class TensorModelLoader:
    """Opens sessions as the settings say."""

    def __init__(self, settings: Settings, registry: Registry, metrics: Metrics, cpu: CpuBudget) -> None:
        """Open sessions whose threads take their turns on the cores from `cpu`."""
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._cpu = cpu

    async def load(self, registered: RegisteredModel) -> LoadedTensorModel:
        """Load a model of the kind `onnx`, and return it once it is warmed up.

        Raises:
            NotFoundError: It has been removed meanwhile.
            ModelFileError: onnxruntime or the tokenizer refuses its files.
            EngineError: There is not enough memory, or it cannot be evaluated.
            StorageError: Its files cannot be laid out.
        """
        name, settings = registered.full_name, self._settings
        LOGGER.info("loading %s", name)
        hold = self._registry.hold(registered)
        try:
            await self._remove_stale()
            folder = await asyncio.to_thread(lay_out, registered, settings.onnx_dir)
            engine = await OnnxEngine.load(
                name, folder / "model.onnx", self._config(registered), self._metrics.for_tensors(name), self._cpu
            )
            try:
                encoder = None
                if registered.task in TEXT_TASKS:
                    encoder = OnnxEncoder(engine, folder, most_tokens=settings.max_embedding_tokens)
                    await encoder.prepare()
            except BaseException:
                await engine.close()
                raise
        except BaseException:
            hold.close()
            raise
        LOGGER.info("loaded %s", name)
        return LoadedTensorModel(registered, engine, encoder, hold)

    def _config(self, registered: RegisteredModel) -> SessionConfig:
        settings = self._settings
        threads = settings.onnx_threads or physical_cores()
        return SessionConfig(
            providers=settings.execution_providers,
            precision=settings.tensorrt_precision,
            engine_cache_dir=settings.onnx_engines_dir / layout_name(registered),
            threads=threads,
            lanes=min(threads, settings.onnx_lanes or (threads if _reads_tokens(registered) else 1)),
            queue_size=settings.queue_size,
            batch_rows=settings.max_batch_rows,
            batch_tokens=settings.max_batch_tokens,
            circuit_failures=settings.circuit_failures,
            circuit_open_s=settings.circuit_open_s,
        )

    async def _remove_stale(self) -> None:
        """Delete what was laid out and compiled for models that are no more."""
        models = [each for each in self._registry.list() if each.kind == ONNX]
        for folder in (self._settings.onnx_dir, self._settings.onnx_engines_dir):
            try:
                await asyncio.to_thread(remove_stale_layouts, folder, models)
            except ApplianceError as error:  # it costs the room on disk and nothing else
                LOGGER.warning("files of removed models stay: %s", error)


def _reads_tokens(registered: RegisteredModel) -> bool:
    """Return True if rows of whole numbers go in: they are short and many, so a thread of its own is best for each."""
    signature = registered.signature
    if signature is None or not signature.batched:
        return False
    return all(each.datatype in (Datatype.INT32, Datatype.INT64) for each in signature.inputs)
