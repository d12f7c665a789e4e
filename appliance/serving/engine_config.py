"""What the settings and the registry say of a model that writes text, in the engine's and the template's terms."""

from __future__ import annotations

from appliance.core.settings import Settings
from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama_embedding.worker import EmbeddingConfig
from appliance.observe.resources import physical_cores
from appliance.registry.known import RegisteredModel
from appliance.serving.prompts import PromptRenderer
from appliance.serving.tools.dialects import tool_style
from appliance.serving.tools.offer import ModelTools


def engine_config(settings: Settings, registered: RegisteredModel) -> EngineConfig:
    """Return how a model that writes text is run."""
    return EngineConfig(
        cells=settings.context_cells,
        sequences=settings.max_sequences,
        batch_tokens=settings.batch_tokens,
        threads=settings.threads or physical_cores(),
        gpu_layers=settings.gpu_layers,
        flash_attention=settings.flash_attention,
        kv_cache_type=settings.kv_cache_type,
        speculation=settings.speculation,
        target_inter_token_latency_s=settings.target_inter_token_latency_s,
        stream_interval_s=settings.stream_interval_s,
        queue_size=settings.queue_size,
        context_limit=registered.default_context or settings.context_cells,
        parking_ram_bytes=settings.parking_ram_bytes,
        parking_disk_bytes=settings.parking_disk_bytes,
        parking_delay_s=settings.parking_delay_s,
        parking_dir=settings.parking_dir if settings.parking_disk_bytes and settings.parking_ram_bytes else None,
        model_sha256=registered.files[0].sha256,
    )


def embedding_config(settings: Settings, registered: RegisteredModel) -> EmbeddingConfig:
    """Return how a model that embeds is run."""
    return EmbeddingConfig(
        longest_input=min(settings.max_embedding_tokens, registered.default_context or 2**31),
        batch_tokens=settings.batch_tokens,
        threads=settings.threads or physical_cores(),
        queue_size=settings.queue_size,
        flash_attention=settings.flash_attention,
    )


def renderer(settings: Settings, registered: RegisteredModel, engine: LlamaEngine) -> PromptRenderer | None:
    """Return what renders a model's chat template; None if it has none."""
    template = registered.chat_template or engine.chat_template
    if template is None:
        return None
    return PromptRenderer(
        template,
        bos_token=engine.begin_text,
        eos_token=engine.end_text,
        timeout_s=settings.template_timeout_s,
        max_bytes=settings.max_rendered_bytes,
        control_texts=engine.control_texts,
    )


async def model_tools(registered: RegisteredModel, engine: LlamaEngine) -> ModelTools:
    """Return how a model is told of tools and calls them."""
    style = tool_style(registered.chat_template or engine.chat_template or "")
    tokens = {}
    for mark in style.dialect.marks:
        found = await engine.tokenize(mark, add_special=False, parse_special=True)
        if len(found) == 1 and not engine.piece(found[0]):
            tokens[mark] = found[0]
    return ModelTools(style, tokens)
