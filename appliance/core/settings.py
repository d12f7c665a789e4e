"""Every setting: its name, type, default, bounds and meaning, and where its effective value came from.

Sources, strongest first: command-line flag, environment (`APPLIANCE_` + the name in capitals), TOML file, the hub of an
enrolled box (`fleet/overlay.py`), default.
An unknown name or a bad value anywhere is an error that names it, never ignored, not even where a stronger source
overrides it. A relative path is relative to the working folder, in a TOML file to the file's folder; `~` is the user's
home. README's table is checked against this file by a test.

Over 400 lines because every setting stands in one list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from appliance.core.errors import SettingsError
from appliance.core.setting_sources import EffectiveSetting, Sources, check_tls, fields_of, load, types_of
from appliance.core.setting_sources import setting as _setting
from appliance.core.types import KvCacheType

__all__ = [
    "EffectiveSetting",
    "Settings",
    "check_together",
    "effective_of",
    "load_settings",
    "setting_fields",
    "setting_types",
]

ENVIRONMENT_PREFIX = "APPLIANCE_"

HUB_ENVIRONMENT_PREFIX = "APPLIANCE_HUB_"
"""Of the hub's settings: one machine may run both programs, and each reads and checks its own."""

_OTHER_VARIABLES = frozenset(
    {"APPLIANCE_CONFIG", "APPLIANCE_EVAL_DATA", "APPLIANCE_TEST_MODEL_DATA", "APPLIANCE_API_KEY"}
)
"""Variables with our prefix that are not settings: the path of the TOML file, test data, the chat client's key."""

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400 * 366)]
Bytes = Annotated[int, Meta(ge=1, le=2**40)]
BytesOrZero = Annotated[int, Meta(ge=0, le=2**50)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective settings. Immutable: a changed setting needs a restart."""

    # Where
    data_dir: Path = _setting(Path("~/.local/share/appliance"), "Folder of databases and models")
    host: str = _setting("127.0.0.1", "Address to listen on; other than loopback needs API keys and TLS")
    port: Port = _setting(8080, "TCP port to listen on; 0 picks a free one")
    tls_certificate: Path | None = _setting(None, "PEM file with the server's certificate chain")
    tls_key: Path | None = _setting(None, "PEM file with the certificate's private key")
    insecure: bool = _setting(False, "Listen beyond loopback without TLS or without API keys, at your own risk")
    require_api_key: bool = _setting(False, "Ask for an API key on loopback too")

    # Models
    model: str = _setting("smollm2-135m-instruct", "Model loaded at start; empty loads on first use")
    max_loaded_models: Count = _setting(1, "Models held in memory at once; the idle one longest unused makes room")
    max_loaded_embedders: Count = _setting(1, "Models held for embeddings at once, beside those for text")
    max_loaded_tensor_models: Count = _setting(8, "ONNX models held in memory at once, encoders included")
    embedding_model: str = _setting(
        "all-minilm-l6-v2", "Model that embeds vector stores, and reranks where a request names no model"
    )
    rerank_model: str = _setting(
        "", "Cross-encoder that reads the best hits of a search again; empty leaves them as they are"
    )
    max_loaded_adapters: Count = _setting(
        4, "LoRA adapters held in memory beside each model; the idle one longest unused makes room"
    )
    adapter_idle_s: Seconds = _setting(600.0, "Idle time after which a LoRA adapter is dropped from memory")
    catalog_dir: Path | None = _setting(None, "Folder of further model manifests (*.toml)")
    download_timeout_s: Seconds = _setting(60.0, "Longest silence of a download source before it is given up")

    # Engine
    context_cells: Annotated[int, Meta(ge=64, le=2**24)] = _setting(
        8192, "KV cells a loaded model shares among its sequences, in tokens"
    )
    max_sequences: Annotated[int, Meta(ge=1, le=64)] = _setting(8, "Sequences a model works on at once")
    threads: Annotated[int, Meta(ge=0, le=1024)] = _setting(0, "CPU threads of a model; 0 is one per physical core")
    batch_tokens: Annotated[int, Meta(ge=32, le=8192)] = _setting(512, "Most tokens of one engine step")
    gpu_layers: Annotated[int, Meta(ge=-1, le=100_000)] = _setting(
        -1, "Layers on the GPU where there is one; -1 is all"
    )
    flash_attention: Literal["auto", "on", "off"] = _setting(
        "auto", "Attention kernel; auto is on with a GPU and off without, where it stalls streams beside long prompts"
    )
    kv_cache_type: KvCacheType = _setting(
        "f16", "Type of the KV cells; q8_0 and q4_0 save memory and turn flash attention on where it is auto"
    )
    speculation: Literal["auto", "off"] = _setting(
        "auto", "Guess tokens ahead from the text so far; auto does so while few answers are written and where it pays"
    )
    target_inter_token_latency_s: Seconds = _setting(
        0.17, "Engine steps are cut to this length while anyone is streaming"
    )
    stream_interval_s: Annotated[float, Meta(ge=0, le=1)] = _setting(
        0.02, "Tokens that come quicker than this are sent together; 0 sends each by itself"
    )
    parking_ram_bytes: BytesOrZero = _setting(
        48 * 1024 * 1024, "RAM for the KV states of conversations that wait for their next turn; 0 is none"
    )
    parking_disk_bytes: BytesOrZero = _setting(
        2 * 1024 * 1024 * 1024, "Disk for them, so that they also survive a restart; 0 is none"
    )
    parking_delay_s: Seconds = _setting(5.0, "Time a conversation is quiet before its KV state is written to disk")
    execution_providers: str = _setting(
        "auto",
        "Where ONNX models run, first choice first, as `tensorrt,cuda,cpu`; auto is that order as far as present",
    )
    tensorrt_precision: Literal["fp32", "fp16", "int8"] = _setting(
        "fp16", "Least exact arithmetic that TensorRT may use; int8 needs a model with calibrated ranges"
    )
    onnx_threads: Annotated[int, Meta(ge=0, le=1024)] = _setting(
        0, "CPU threads of an ONNX model; 0 is one per physical core, in turns with the models for text"
    )
    onnx_lanes: Annotated[int, Meta(ge=0, le=1024)] = _setting(
        0,
        "Evaluations at once of an ONNX model on a CPU, which share its threads; 0 is one each where tokens go in",
    )
    max_batch_rows: Annotated[int, Meta(ge=1, le=4096)] = _setting(64, "Most rows of one batch of an ONNX model")
    max_batch_tokens: Annotated[int, Meta(ge=16, le=2**24)] = _setting(
        4096,
        "Most tokens of one batch of an ONNX model, padding included; on a CPU 256 suffice. "
        "4 KiB of other tensors count as one",
    )
    circuit_failures: Count = _setting(5, "Failures in a row after which an ONNX model answers 503 for a while")
    circuit_open_s: Seconds = _setting(30.0, "Time until such a model is tried again")
    embedding_cache_bytes: BytesOrZero = _setting(
        128 * 1024 * 1024, "Disk for embeddings that may be asked for again; 0 is none"
    )
    index_memory_bytes: Bytes = _setting(
        256 * 1024 * 1024,
        "Memory for the vector indexes of stores; the one longest unused is closed, a single larger one is not",
    )
    queue_size: CountOrZero = _setting(64, "Requests that may wait for a sequence; one more is answered 429")
    stalled_engine_s: Seconds = _setting(60.0, "Heartbeat age at which an engine counts as dead")

    # Memory of conversations
    conversation_days: CountOrZero = _setting(
        0, "Days after its last change that a conversation is kept; 0 is for ever"
    )
    response_days: CountOrZero = _setting(30, "Days that a response is kept, what follows it included; 0 is for ever")
    max_conversations: CountOrZero = _setting(
        0, "Most conversations of an API key; those longest unchanged are erased. 0 is no limit"
    )

    # Offline work
    batch_concurrency: Annotated[int, Meta(ge=1, le=64)] = _setting(
        2, "Lines of batches that are answered at once, all batches together"
    )
    max_batch_lines: Annotated[int, Meta(ge=1, le=1_000_000)] = _setting(50_000, "Most lines of a batch")
    max_batches: Count = _setting(32, "Batches of an API key that have not ended; one more is answered 429")

    # Limits of a request
    max_body_bytes: Bytes = _setting(16 * 1024 * 1024, "Largest request body")
    max_tensor_body_bytes: Bytes = _setting(64 * 1024 * 1024, "Largest request body of /v2 inference")
    max_file_bytes: Bytes = _setting(512 * 1024 * 1024, "Largest file that /v1/files takes")
    max_header_bytes: Annotated[int, Meta(ge=1024, le=2**24)] = _setting(32 * 1024, "Largest request head")
    max_prompt_characters: Count = _setting(4_000_000, "Longest prompt before it is tokenized")
    max_choices: Annotated[int, Meta(ge=1, le=64)] = _setting(8, "Largest `n`")
    max_prompts: Annotated[int, Meta(ge=1, le=1024)] = _setting(32, "Most prompts in one /v1/completions request")
    max_embedding_inputs: Annotated[int, Meta(ge=1, le=65_536)] = _setting(
        2048, "Most inputs in one /v1/embeddings request"
    )
    max_rerank_documents: Annotated[int, Meta(ge=1, le=65_536)] = _setting(
        1000, "Most documents in one /v1/rerank request, or inputs in one to /v1/classify"
    )
    max_embedding_tokens: Annotated[int, Meta(ge=16, le=2**20)] = _setting(
        2048, "Longest input of an embedding in tokens, where the model was not trained on less"
    )
    max_loop_steps: Annotated[int, Meta(ge=1, le=1000)] = _setting(
        12, "Times that a response may ask its model; the last time no tool is offered"
    )
    max_tool_calls: Annotated[int, Meta(ge=1, le=1000)] = _setting(16, "Calls of built-in tools of one response")
    loop_timeout_s: Seconds = _setting(120.0, "Time after which a response makes no further call of a tool")
    tool_timeout_s: Seconds = _setting(30.0, "Longest time of one call of a built-in tool")
    max_tool_result_bytes: Annotated[int, Meta(ge=64, le=2**24)] = _setting(
        8192, "Of a tool's result, what the model is shown; the rest is kept with the response"
    )
    sql_databases: str = _setting(
        "", "SQLite files that the tool `sql` may read, as `sales=/srv/sales.db, stock=/srv/stock.db`"
    )
    mcp_servers: str = _setting(
        "", "URLs of the MCP servers that responses may use, separated by commas or spaces; empty is none"
    )
    mcp_timeout_s: Seconds = _setting(20.0, "Longest time to ask an MCP server for its tools, or to call one of them")
    max_background_responses: Count = _setting(
        64, "Responses that run in the background at once; one more is answered 429"
    )
    header_timeout_s: Seconds = _setting(10.0, "Longest time for a client to send a request head")
    body_timeout_s: Seconds = _setting(60.0, "Longest time for a client to send a request body; of a file, each MiB")
    write_timeout_s: Seconds = _setting(60.0, "Longest time for a client to take in what is written to it")
    request_timeout_s: Seconds = _setting(600.0, "Longest time for one request's work, queueing included")
    keep_alive_timeout_s: Seconds = _setting(75.0, "Idle time after which a connection is closed")
    stream_keep_alive_s: Seconds = _setting(15.0, "Silence after which a stream sends a comment line")
    max_connections: Count = _setting(512, "Open connections; one more is answered 503")
    shutdown_grace_s: Seconds = _setting(20.0, "Time for running requests to end after SIGTERM")
    template_timeout_s: Seconds = _setting(2.0, "Longest time to render a chat template")
    max_rendered_bytes: Bytes = _setting(16 * 1024 * 1024, "Largest rendered chat template")
    max_document_characters: Annotated[int, Meta(ge=1_000, le=10**9)] = _setting(
        20_000_000, "Longest text that is taken from a file"
    )
    document_timeout_s: Seconds = _setting(300.0, "Longest time to take the text from a file")

    # Fleet
    fleet: Literal["auto", "on", "off"] = _setting(
        "auto", "Connect to the fleet's hub; auto does so once this box is enrolled"
    )
    fleet_will_delay_s: Annotated[int, Meta(ge=0, le=3600)] = _setting(
        60, "Time without a connection after which the broker tells the hub that this box is lost"
    )
    update_bytes_per_s: BytesOrZero = _setting(
        0, "Most bytes of an update a second that are asked of the hub over MQTT; 0 is no limit"
    )
    update_dir: Path | None = _setting(
        None, "Folder, such as a memory stick or a share, where the files of releases may lie"
    )

    fleet_telemetry: Literal["on", "off"] = _setting(
        "on", "Tell the hub of health, figures, resources, models and alarms; never of any text of a request"
    )
    fleet_outbox_bytes: Annotated[int, Meta(ge=256 * 1024, le=2**40)] = _setting(
        64 * 1024 * 1024, "Disk for telemetry that the hub does not have yet; the least important gives way first"
    )

    # Observability
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Least severity that is logged")
    log_format: Literal["auto", "json", "text"] = _setting(
        "auto", "auto is text in a terminal and JSON lines otherwise"
    )

    @property
    def database_path(self) -> Path:
        """Return the path of `appliance.db`."""
        return self.data_dir / "appliance.db"

    @property
    def blobs_dir(self) -> Path:
        """Return the folder of content-addressed model files."""
        return self.data_dir / "models" / "blobs"

    @property
    def cache_path(self) -> Path:
        """Return the path of `cache.db`, which holds only what can be computed again."""
        return self.data_dir / "cache.db"

    @property
    def onnx_dir(self) -> Path:
        """Return the folder where the files of loaded ONNX models stand under the names they have for each other."""
        return self.data_dir / "onnx"

    @property
    def onnx_engines_dir(self) -> Path:
        """Return the folder of what TensorRT made of ONNX models, which takes it minutes."""
        return self.data_dir / "onnx-engines"

    @property
    def retrieval_path(self) -> Path:
        """Return the path of `retrieval.db`, which holds files, vector stores, chunks and vectors."""
        return self.data_dir / "retrieval.db"

    @property
    def retrieval_lock_path(self) -> Path:
        """Return the path of the file whose lock makes a process the one that has files, stores and their indexes."""
        return self.data_dir / "retrieval.lock"

    @property
    def sessions_path(self) -> Path:
        """Return the path of `sessions.db`, which holds conversations and responses."""
        return self.data_dir / "sessions.db"

    @property
    def sessions_lock_path(self) -> Path:
        """Return the path of the file whose lock makes a process the one that has conversations and responses."""
        return self.data_dir / "sessions.lock"

    @property
    def batches_path(self) -> Path:
        """Return the path of `batches.db`, which holds batches and the answers that are in no file yet."""
        return self.data_dir / "batches.db"

    @property
    def batches_lock_path(self) -> Path:
        """Return the path of the file whose lock makes a process the one that works off batches."""
        return self.data_dir / "batches.lock"

    @property
    def fleet_dir(self) -> Path:
        """Return the folder of this box's identity at its hub."""
        return self.data_dir / "fleet"

    @property
    def fleet_imports_dir(self) -> Path:
        """Return the folder where `appliance fleet import` hands requests to the server and gets its answers."""
        return self.fleet_dir / "imports"

    @property
    def fleet_path(self) -> Path:
        """Return the path of `fleet.db`: sessions, the twin, replies to commands and the journal of updates."""
        return self.data_dir / "fleet.db"

    @property
    def telemetry_path(self) -> Path:
        """Return the path of `telemetry.db`, which holds what the hub does not have yet."""
        return self.data_dir / "telemetry.db"

    @property
    def fleet_lock_path(self) -> Path:
        """Return the path of the file whose lock makes a process the one that speaks for this box to its hub."""
        return self.data_dir / "fleet.lock"

    @property
    def keyword_index_dir(self) -> Path:
        """Return the folder of the keyword index, which is derived from `retrieval.db`."""
        return self.data_dir / "indexes" / "keywords"

    @property
    def vector_indexes_dir(self) -> Path:
        """Return the folder of the vector indexes, which are derived from `retrieval.db`."""
        return self.data_dir / "indexes" / "vectors"

    @property
    def parking_dir(self) -> Path:
        """Return the folder of the KV states of conversations that wait for their next turn."""
        return self.data_dir / "kv"


def setting_fields() -> dict[str, Field[Any]]:
    """Return every setting's dataclass field by name."""
    return fields_of(Settings)


def effective_of(settings: Settings) -> list[EffectiveSetting]:
    """Return settings that a program made, as if it had set each that is not as by default."""
    default = Settings()
    return [
        EffectiveSetting(
            name,
            value := getattr(settings, name),
            "default" if value == getattr(default, name) else "the program that started it",
            each.metadata["meaning"],
        )
        for name, each in setting_fields().items()
    ]


def setting_types() -> dict[str, Any]:
    """Return every setting's annotation by name, bounds included."""
    return types_of(Settings)


def load_settings(
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> tuple[Settings, list[EffectiveSetting]]:
    """Merge the sources and check every value.

    Args:
        flags: Values from the command line; None values count as not given.
        environment: The process environment; only names with `ENVIRONMENT_PREFIX` are looked at.
        config_file: A TOML file with settings at its top level.

    Returns:
        The settings, and each value with its origin in the order of declaration.

    Raises:
        SettingsError: An unknown name, a value of the wrong type or out of range, or an unreadable file.
    """
    sources = Sources(flags or {}, environment or {}, config_file)
    settings, effective = load(Settings(), sources, ENVIRONMENT_PREFIX, other_variables=_is_no_setting)
    check_together(settings)
    return settings, effective


def _is_no_setting(variable: str) -> bool:
    return variable in _OTHER_VARIABLES or variable.startswith(HUB_ENVIRONMENT_PREFIX)


def check_together(settings: Settings) -> None:
    """Check what one setting's own bounds cannot say.

    Raises:
        SettingsError: Two settings do not go together; `param` is the one to change.
    """
    check_tls(settings.tls_certificate, settings.tls_key)
    if settings.max_sequences > settings.context_cells // 8:
        raise SettingsError(
            f"{settings.max_sequences} sequences cannot share {settings.context_cells} context cells.",
            advice="Raise context_cells or lower max_sequences: each sequence needs at least 8 cells.",
            param="context_cells",
        )
    if settings.max_sequences > settings.batch_tokens:
        raise SettingsError(
            f"A step of {settings.batch_tokens} tokens cannot hold one of each of {settings.max_sequences} sequences.",
            advice="Raise batch_tokens or lower max_sequences.",
            param="batch_tokens",
        )
    if settings.kv_cache_type != "f16" and settings.flash_attention == "off":
        raise SettingsError(
            f"KV cells of the type {settings.kv_cache_type} need flash attention, which is off.",
            advice="Set flash_attention to auto or on, or kv_cache_type to f16.",
            param="kv_cache_type",
        )
