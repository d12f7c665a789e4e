"""A release: what the hub signs and a device installs. Every path here is a target of the signed (TUF) repository.

    keys/director.json                          public keys that may sign jobs and desired twins
    releases/<model>/<counter>/release.json     a `Release`
    releases/<model>/<counter>/<digest>.pieces  the SHA-256 of each piece of one file, 32 bytes each, in order

The model files themselves are no targets: each piece of them is checked against its list, and the whole file against
its digest in the release.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from appliance.core.fleet import Count, Digest, Name

DIRECTOR_TARGET = "keys/director.json"
JOB_TYPE = "application/vnd.appliance.job+json"
DESIRED_TYPE = "application/vnd.appliance.desired+json"
"""Payload types of DSSE envelopes: an envelope of one kind is refused where the other is due."""

LARGEST_RELEASE_BYTES = 1024 * 1024


def release_target(model: str, counter: int) -> str:
    """Return the path of a release document."""
    return f"releases/{model}/{counter}/release.json"


def pieces_target(model: str, counter: int, digest: str) -> str:
    """Return the path of a file's piece list."""
    return f"releases/{model}/{counter}/{digest}.pieces"


class DirectorKeys(Struct, frozen=True):
    """`keys/director.json`: whose signature on jobs and desired twins counts.

    Attributes:
        keys: Public Ed25519 keys, 32 bytes in hex each.
        threshold: How many of them have to sign.
    """

    keys: Annotated[tuple[Digest, ...], Meta(min_length=1, max_length=16)]
    threshold: Annotated[int, Meta(ge=1, le=16)] = 1


class ReleaseFile(Struct, frozen=True):
    """One file of a release; `role` and the rest as in the registry's `ModelFile`."""

    role: Annotated[str, Meta(min_length=1, max_length=300)]
    length: Count
    digest: Digest


class GoldenInput(Struct, frozen=True):
    """An input and what must come of it.

    Attributes:
        prompt: For a model that writes: text to complete at temperature 0; for an encoder: text to embed.
        expected: What the answer must begin with, or "" if anything will do.
        max_tokens: Of the answer.
        tensors: For a model of tensors: inputs by name as nested lists.
        outputs: For a model of tensors or an encoder: expected values by name, compared with `tolerance`.
        tolerance: Largest absolute difference; for an encoder one minus the least cosine.
    """

    prompt: str = ""
    expected: str = ""
    max_tokens: Count = 16
    tensors: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    tolerance: float = 0.01


class Criteria(Struct, frozen=True):
    """What a release must meet on the device itself; 0 asks for nothing.

    Attributes:
        golden: Inputs with their expected outcome.
        least_tokens_per_second: Of the self-test's own decoding, or inputs a second of an encoder.
        most_memory: Bytes of the self-test's process.
        test_timeout_s: Longest time of the self-test, loading included.
        most_error_rate: Of the requests of the soak.
        most_latency_ratio: p95 during the soak against that of the version before.
    """

    golden: tuple[GoldenInput, ...] = ()
    least_tokens_per_second: float = 0.0
    most_memory: Count = 0
    test_timeout_s: float = 300.0
    most_error_rate: float = 0.1
    most_latency_ratio: float = 2.0


class Release(Struct, frozen=True):
    """`release.json`: one version of one model.

    Attributes:
        model: Its name.
        version: What follows the colon in `name:version`.
        counter: Rises with each release of the model; a device goes back only by a new release of old bytes.
        kind: `gguf` or `onnx`.
        task: As in the registry.
        licence: SPDX licence expression.
        files: The first is the one that is loaded.
        minimum_memory: Bytes.
        hardware: Hardware classes it is for; empty is all.
        least_agent: Oldest program version that can run it, or "".
        created: Unix seconds.
        default_context: Tokens of a conversation, or None.
        chat_template: Replaces the one in the file, or None.
        stop: Strings that end an answer.
        criteria: What it must meet on the device.
    """

    model: Name
    version: Name
    counter: Annotated[int, Meta(ge=1, le=2**53)]
    kind: Literal["gguf", "onnx"]
    task: str
    licence: str
    files: Annotated[tuple[ReleaseFile, ...], Meta(min_length=1, max_length=256)]
    minimum_memory: Count = 0
    hardware: tuple[str, ...] = ()
    least_agent: str = ""
    created: float = 0.0
    default_context: int | None = None
    chat_template: str | None = None
    stop: tuple[str, ...] = ()
    criteria: Criteria = Criteria()
