"""Every setting: its name, type, default, bounds and meaning, and where its effective value came from.

Sources, strongest first: command-line flag, environment (`APPLIANCE_` + the name in capitals), TOML file, default.
An unknown name or a bad value anywhere is an error that names it, never ignored. README's table is checked
against this file by a test.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from appliance.core.errors import SettingsError

ENVIRONMENT_PREFIX = "APPLIANCE_"

_OTHER_VARIABLES = frozenset(
    {"APPLIANCE_CONFIG", "APPLIANCE_EVAL_DATA", "APPLIANCE_TEST_MODEL_DATA", "APPLIANCE_API_KEY"}
)
"""Variables with our prefix that are not settings: the path of the TOML file, test data, the chat client's key."""

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=86_400 * 366)]
Bytes = Annotated[int, Meta(ge=1)]


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


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
    catalog_dir: Path | None = _setting(None, "Folder of further model manifests (*.toml)")
    download_timeout_s: Seconds = _setting(60.0, "Longest silence of a download source before it is given up")

    # Engine
    context_cells: Count = _setting(8192, "KV cells a loaded model shares among its sequences, in tokens")
    max_sequences: Annotated[int, Meta(ge=1, le=64)] = _setting(8, "Sequences a model works on at once")
    threads: CountOrZero = _setting(0, "CPU threads of a model; 0 is one per physical core")
    batch_tokens: Annotated[int, Meta(ge=32, le=8192)] = _setting(512, "Most tokens of one engine step")
    gpu_layers: Annotated[int, Meta(ge=-1)] = _setting(-1, "Layers on the GPU where there is one; -1 is all")
    target_inter_token_latency_s: Seconds = _setting(
        0.15, "Engine steps are cut to this length while anyone is streaming"
    )
    queue_size: CountOrZero = _setting(64, "Requests that may wait for a sequence; one more is answered 429")
    stalled_engine_s: Seconds = _setting(60.0, "Heartbeat age at which an engine counts as dead")

    # Limits of a request
    max_body_bytes: Bytes = _setting(16 * 1024 * 1024, "Largest request body")
    max_header_bytes: Annotated[int, Meta(ge=1024)] = _setting(32 * 1024, "Largest request head")
    max_prompt_characters: Count = _setting(4_000_000, "Longest prompt before it is tokenized")
    max_choices: Annotated[int, Meta(ge=1, le=64)] = _setting(8, "Largest `n`")
    max_prompts: Annotated[int, Meta(ge=1, le=1024)] = _setting(32, "Most prompts in one /v1/completions request")
    header_timeout_s: Seconds = _setting(10.0, "Longest time for a client to send a request head")
    body_timeout_s: Seconds = _setting(60.0, "Longest time for a client to send a request body")
    write_timeout_s: Seconds = _setting(60.0, "Longest time for a client to take in what is written to it")
    request_timeout_s: Seconds = _setting(600.0, "Longest time for one request's work, queueing included")
    keep_alive_timeout_s: Seconds = _setting(75.0, "Idle time after which a connection is closed")
    stream_keep_alive_s: Seconds = _setting(15.0, "Silence after which a stream sends a comment line")
    max_connections: Count = _setting(512, "Open connections; one more is answered 503")
    shutdown_grace_s: Seconds = _setting(20.0, "Time for running requests to end after SIGTERM")
    template_timeout_s: Seconds = _setting(2.0, "Longest time to render a chat template")
    max_rendered_bytes: Bytes = _setting(16 * 1024 * 1024, "Largest rendered chat template")

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


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """One setting as it stands, for `appliance config`."""

    name: str
    value: Any
    origin: str
    meaning: str


def setting_fields() -> dict[str, Field[Any]]:
    """Return every setting's dataclass field by name."""
    return {each.name: each for each in fields(Settings)}


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
    given: dict[str, tuple[Any, str]] = {}
    if config_file is not None:
        for name, value in _read_toml(config_file).items():
            given[name] = (value, f"file {config_file}")
    for variable, text in sorted((environment or {}).items()):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in _OTHER_VARIABLES:
            given[variable.removeprefix(ENVIRONMENT_PREFIX).lower()] = (text, f"environment {variable}")
    for name, value in (flags or {}).items():
        if value is not None:
            given[name] = (value, f"flag --{name.replace('_', '-')}")

    known = setting_fields()
    values: dict[str, Any] = {}
    for name, (value, origin) in given.items():
        if name not in known:
            raise SettingsError(
                f"{origin} sets {name!r}, which is no setting.",
                advice="`appliance config` lists them all.",
                param=name,
            )
        values[name] = _convert(name, value, origin)
    settings = replace(Settings(), **values)
    settings = replace(settings, data_dir=settings.data_dir.expanduser().absolute())
    effective = [
        EffectiveSetting(
            name=name,
            value=getattr(settings, name),
            origin=given[name][1] if name in given else "default",
            meaning=each.metadata["meaning"],
        )
        for name, each in known.items()
    ]
    return settings, effective


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} is not valid TOML: {error}.") from error


def _convert(name: str, value: Any, origin: str) -> Any:
    """Check one value; text from the environment or a flag is read as the setting's type."""
    try:
        return msgspec.convert(value, _types()[name], strict=not isinstance(value, str), dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{origin} sets {name} to {value!r}: {error}.", param=name) from error


def _decode_path(wanted: type, value: Any) -> Any:
    if wanted is Path and isinstance(value, str | Path):
        return Path(value)
    raise msgspec.ValidationError(f"Expected {wanted.__name__}, got {type(value).__name__}")


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Settings, include_extras=True)
