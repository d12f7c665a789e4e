"""Which file of a folder is the graph of an ONNX model; told by names alone, without the onnx package."""

from __future__ import annotations

from pathlib import Path

from appliance.core.errors import InvalidRequestError
from appliance.registry.files import storage_errors

GRAPH_SUFFIX = ".onnx"
MAX_SHOWN = 8


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


def _graphs(folder: Path) -> list[Path]:
    found = [*folder.iterdir(), *((folder / "onnx").iterdir() if (folder / "onnx").is_dir() else ())]
    return sorted(each for each in found if each.suffix.lower() == GRAPH_SUFFIX and each.is_file())
