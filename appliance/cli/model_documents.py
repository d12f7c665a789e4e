"""What is known of a model as a document for programs, and as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from appliance.cli.tables import print_table

if TYPE_CHECKING:
    from appliance.core.tensors import ModelSignature
    from appliance.registry.catalog import CatalogEntry
    from appliance.registry.known import RegisteredModel
    from appliance.registry.verify import Finding


def document(model: RegisteredModel) -> dict[str, Any]:
    """Return all that is known of a model on this box."""
    return {
        "name": model.name,
        "version": model.version,
        "installed": True,
        "kind": model.kind,
        "adapter": model.adapter or None,
        "rank": model.rank or None,
        "task": model.task,
        "licence": model.licence,
        "created": model.created,
        "architecture": model.architecture,
        "quantisation": model.quantisation,
        "context_length": model.context_length,
        "default_context": model.default_context,
        "minimum_memory": model.minimum_memory,
        "size": model.size,
        "stop": model.stop,
        "chat_template": model.chat_template,
        "signature": model.signature,
        "files": [
            {"role": each.role, "path": each.path, "sha256": each.sha256, "size": each.size} for each in model.files
        ],
    }


def entry_document(entry: CatalogEntry, installed: bool) -> dict[str, Any]:
    """Return all that is known of a model that can be had."""
    manifest = entry.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "installed": installed,
        "description": manifest.description,
        "kind": manifest.kind,
        "adapter": manifest.adapter,
        "task": manifest.task,
        "licence": manifest.licence,
        "minimum_memory": manifest.minimum_memory,
        "size": manifest.size,
        "files": [
            {"role": each.role, "name": each.name, "sha256": each.sha256, "size": each.size, "sources": each.sources}
            for each in manifest.files
        ],
    }


def finding_document(finding: Finding) -> dict[str, Any]:
    """Return how one file of a model was found."""
    return {
        "model": finding.model.full_name,
        "role": finding.file.role,
        "path": finding.file.path,
        "sha256": finding.file.sha256,
        "sound": not finding.problem,
        "problem": finding.problem,
    }


def megabytes(count: int) -> str:
    """Return a size as a person reads it, in decimal megabytes as disks are sold."""
    return f"{count / 1e6:,.1f} MB"


def print_fields(document: dict[str, Any]) -> None:
    """Print a document as a table, without the fields that say nothing."""
    rows = []
    for name, value in document.items():
        if name == "files":
            rows += [
                [f"file {each['role']}", f"{each.get('path', each.get('name'))} ({megabytes(each['size'])})"]
                for each in value
            ]
        elif name == "signature":
            rows += [] if value is None else _signature_rows(value)
        elif value not in (None, "", ()) and (name, value) != ("context_length", 0):
            shown = megabytes(value) if name in ("size", "minimum_memory") else value
            rows.append(
                [name.replace("_", " "), ", ".join(map(repr, shown)) if isinstance(shown, tuple) else str(shown)]
            )
    print_table(["Field", "Value"], rows)


def _signature_rows(signature: ModelSignature) -> list[list[str]]:
    """Describe a tensor model; a free dimension is shown as `?`."""
    kinds = [("input", signature.inputs), ("output", signature.outputs)]
    rows = [
        [kind, f"{each.name} {each.datatype} [{', '.join(str(size) if size >= 0 else '?' for size in each.shape)}]"]
        for kind, specs in kinds
        for each in specs
    ]
    most = f", at most {signature.longest_batch:,} rows" if signature.longest_batch else ""
    batch = f"first dimension{most}" if signature.batched else "none"
    return [*rows, ["batch", batch], ["opset", str(signature.opset)]]
