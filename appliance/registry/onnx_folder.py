"""Which files of a folder make up an ONNX model, as sentence-transformers and Hugging Face lay them out.

    model.onnx or onnx/model.onnx   the graph, and the data files it names beside it
    tokenizer.json, config.json, 1_Pooling/config.json, …   what says how text becomes its inputs (`COMPANIONS`)

The graph chooses the paths of its data files: those must lie in the graph's own folder, links included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from appliance.core.errors import InvalidRequestError, ModelFileError
from appliance.registry.files import storage_errors
from appliance.registry.onnx_header import OnnxHeader, check_external, read_onnx
from appliance.registry.onnx_purpose import COMPANIONS, Purpose, read_purpose
from appliance.registry.roles import check_path_roles

GRAPH_SUFFIX = ".onnx"
MAX_SHOWN = 8


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A sound ONNX model: what its graph says, and what its files say it is for."""

    header: OnnxHeader
    purpose: Purpose


def is_onnx(path: Path) -> bool:
    """Tell whether a path is an ONNX file, or a folder with one and without GGUF files."""
    with storage_errors(path):
        if not path.is_dir():
            return path.suffix.lower() == GRAPH_SUFFIX
        return not any(each.suffix.lower() == ".gguf" for each in path.iterdir()) and bool(_graphs(path))


def find_graph(path: Path, file: str | None = None) -> Path:
    """Return the graph: the file itself, the folder's only one, or the one named `file` in the folder.

    Raises:
        InvalidRequestError: There is none or more than one, or `file` is none of them.
    """
    with storage_errors(path):
        if not path.is_dir():
            if file is not None:
                raise InvalidRequestError(
                    f"{path} is a file, so --file {file!r:.80} has no meaning.", advice="Name the folder.", param="file"
                )
            return path
        found = _graphs(path)
    names = [str(each.relative_to(path)) for each in found]
    if file is not None and file in names:
        return path / file
    shown = ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")
    if file is not None:
        raise InvalidRequestError(
            f"The folder {path} has no ONNX file {file!r:.80}; it has: {shown or 'none'}.", param="file"
        )
    if len(found) != 1:
        raise InvalidRequestError(
            f"The folder {path} holds {len(found)} ONNX files ({shown or 'none'}); it must be one.",
            advice="Choose one: appliance models import FOLDER --file NAME" if found else "Name another folder.",
        )
    return found[0]


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


def _graphs(folder: Path) -> list[Path]:
    found = [*folder.iterdir(), *((folder / "onnx").iterdir() if (folder / "onnx").is_dir() else ())]
    return sorted(each for each in found if each.suffix.lower() == GRAPH_SUFFIX and each.is_file())
