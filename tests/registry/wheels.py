"""Real wheels with a model inside, and package indexes on loopback."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.registry.models import TinyModel
from tests.registry.servers import Handler

MEMBER = "tinypackage/tiny.gguf"
CREDENTIALS = base64.b64encode(b"me:secret").decode()


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on disk, whose own code would leave a mark if it ran."""

    path: Path
    mark: Path

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()

    def source(self, **changes: Any) -> dict[str, Any]:
        """Return the manifest's source for the model in it."""
        return {
            "kind": "wheel",
            "package": "tinypackage",
            "version": "1.0",
            "member": MEMBER,
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "size": len(self.content),
        } | changes


def write_wheel(folder: Path, tiny: TinyModel, *, comment: str = "") -> Wheel:
    """Build `tinypackage` 1.0, which needs a package that does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    path, mark = folder / "tinypackage-1.0-py3-none-any.whl", folder / "code-of-the-package-ran"
    info = "tinypackage-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tinypackage\nVersion: 1.0\nRequires-Dist: does-not-exist-anywhere\n"
    leave_mark = f"open({str(mark)!r}, 'w')\n"
    members = {
        MEMBER: tiny.content,
        "tinypackage/__init__.py": leave_mark.encode(),
        "tinypackage.pth": f"import builtins; {leave_mark}".encode(),
        "setup.py": leave_mark.encode(),
        f"{info}/METADATA": metadata.encode() + f"Summary: {comment}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        record = ""
        for name, content in members.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(content)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return Wheel(path, mark)


def answer_as_index(handler: Handler, wheel: Wheel, *, metadata: bool = True, hashes: bool = True) -> bool:
    """Answer as a simple package index (PEP 503, with the metadata files of PEP 658)."""
    content = wheel.content
    if handler.path.startswith("/simple/"):
        fragment = f"#sha256={hashlib.sha256(content).hexdigest()}" if hashes else ""
        offered = ' data-core-metadata="true"' if metadata else ""
        page = f'<!DOCTYPE html><a href="/files/{wheel.path.name}{fragment}"{offered}>{wheel.path.name}</a>'.encode()
        handler.head(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
        handler.body(page)
        return True
    if handler.path.endswith(".metadata"):
        with zipfile.ZipFile(wheel.path) as archive:
            text = archive.read("tinypackage-1.0.dist-info/METADATA")
        handler.head(200, {"Content-Length": str(len(text))})
        handler.body(text)
        return True
    return False


def requires_credentials(handler: Handler) -> bool:
    """Answer 401 to whoever does not bring `CREDENTIALS`; return whether that was so."""
    if handler.headers.get("Authorization") == f"Basic {CREDENTIALS}":
        return False
    handler.head(401, {"WWW-Authenticate": "Basic realm=index", "Content-Length": "0"})
    return True
