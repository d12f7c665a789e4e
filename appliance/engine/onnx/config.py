"""What a session is run with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """What a session is run with, see the settings.

    Attributes:
        providers: The setting `execution_providers`.
        precision: The setting `tensorrt_precision`.
        engine_cache_dir: Where TensorRT keeps what it has built, which takes it minutes; None keeps nothing.
        gpu_memory_bytes: Most memory of the GPU that the session may take; 0 is no limit.
        threads: CPU threads.
        queue_size: Requests that may wait beside those that are worked on.
        batch_rows: Most rows of a batch.
        batch_tokens: Most tokens of a batch, padding included.
        circuit_failures: Failures in a row after which requests are refused for a while.
        circuit_open_s: That while.
    """

    providers: str = "auto"
    precision: Literal["fp32", "fp16", "int8"] = "fp16"
    engine_cache_dir: Path | None = None
    gpu_memory_bytes: int = 0
    threads: int = 1
    queue_size: int = 64
    batch_rows: int = 64
    batch_tokens: int = 4096
    circuit_failures: int = 5
    circuit_open_s: float = 30.0
