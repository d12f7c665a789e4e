"""Which files of a folder make up an ONNX model, as sentence-transformers and Hugging Face lay them out.

    model.onnx or onnx/model.onnx   the graph, and the data files it names beside it
    tokenizer.json, config.json, 1_Pooling/config.json, …   what says how text becomes its inputs (`COMPANIONS`)

The graph chooses the paths of its data files: those must lie in the graph's own folder, links included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from appliance.core.errors import ModelFileError
from appliance.registry.files import storage_errors
from appliance.registry.onnx_header import OnnxHeader, check_external, read_onnx
from appliance.registry.onnx_purpose import COMPANIONS, Purpose, read_purpose
from appliance.registry.roles import check_path_roles


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A sound ONNX model: what its graph says, and what its files say it is for."""

    header: OnnxHeader
    purpose: Purpose


def find_companions(path: Path, graph: Path) -> dict[str, Path]:
    """Return the files that go with a graph, by their roles; a graph that was named itself comes alone."""
    with storage_errors(path):
        if not path.is_dir():
            return {}
        places = {role: (path / role, graph.parent / role) for role in COMPANIONS}
        return {
            role: next(each for each in both if each.is_file())
            for role, both in places.items()
            if any(each.is_file() for each in both)
        }


def find_external(graph: Path, header: OnnxHeader) -> dict[str, Path]:
    """Return the graph's data files that are there, by their roles.

    Raises:
        ModelFileError: One is outside the graph's folder by a link.
    """
    folder = graph.parent.resolve()
    found = {}
    for location in header.external:
        path = folder / location
        with storage_errors(path):
            if not path.exists():
                continue
            if not path.resolve().is_relative_to(folder):
                raise ModelFileError(
                    f"The ONNX model keeps data in {location!r:.100}, which is a link out of its folder.",
                    advice="Put the file itself there.",
                )
        found[location] = path
    return found


def read_model(graph: Path, files: Mapping[str, Path], task: str | None = None) -> OnnxModel:
    """Check a model as a whole.

    Args:
        graph: Its ONNX file.
        files: All others, by their roles.
        task: What it is said to be for, or None.

    Raises:
        ModelFileError: A file of it is damaged, hostile, missing, or of a kind that cannot be served.
        InvalidRequestError: It lacks what the task needs.
    """
    check_path_roles(files)
    header = read_onnx(graph)
    check_external(header, files)
    return OnnxModel(header, read_purpose(header.signature, files, task))
