"""What a model is run with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from appliance.core.types import KvCacheType
from appliance.engine.llama.context import uses_flash_attention
from appliance.engine.llama.native import llama_cpp_version
from appliance.engine.llama.state_format import Origin


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a model is run with, see the settings of the same names; `context_limit` is of one request, in tokens."""

    cells: int
    sequences: int
    batch_tokens: int
    threads: int
    gpu_layers: int
    target_inter_token_latency_s: float
    queue_size: int
    context_limit: int = 2**31 - 1
    flash_attention: Literal["auto", "on", "off"] = "auto"
    kv_cache_type: KvCacheType = "f16"
    speculation: Literal["auto", "off"] = "auto"
    stream_interval_s: float = 0.0
    parking_ram_bytes: int = 0
    parking_disk_bytes: int = 0
    parking_delay_s: float = 5.0
    parking_dir: Path | None = None
    model_sha256: str = ""

    @property
    def slots(self) -> int:
        """Return how many native sequences the context has: where pasts are parked, some beside those that run."""
        return 2 * self.sequences if self.parking_ram_bytes else self.sequences

    @property
    def origin(self) -> Origin:
        """Return what makes a parked state fit."""
        return Origin(
            model_sha256=self.model_sha256,
            library=llama_cpp_version(),
            cells=self.cells,
            key_type=self.kv_cache_type,
            value_type=self.kv_cache_type,
            flash_attention=uses_flash_attention(self.flash_attention, self.kv_cache_type),
            full_window=True,
        )
