"""Updates from the job to the confirmation, on real files, with a real registry and journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.registry.install import import_model
from tests.fleet.links import KeptLink
from tests.fleet.updating import MODEL, Releases, UpdatingBox, sealed, tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path / "released")


@pytest.fixture
def box(tmp_path: Path, releases: Releases) -> Iterator[UpdatingBox]:
    """Return a box that has `tiny:1`, and the releases' files on a stick."""
    opened = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])
    tiny_model(tmp_path / "old.gguf", seed=0)
    import_model(tmp_path / "old.gguf", opened.registry, name=MODEL, version="1")
    yield opened
    opened.close()


def meant(box: UpdatingBox) -> str:
    return box.registry.resolve(MODEL).version


async def test_a_release_is_verified_fetched_staged_tested_tried_and_confirmed(
    box: UpdatingBox, releases: Releases, tmp_path: Path
) -> None:
    content = tiny_model(tmp_path / "new.gguf", embedding=192)
    job = releases.add(content)
    assert await box.updates.take(sealed(job))
    report = await box.until("confirmed", "failed", "rejected")
    assert (report.state, report.percent, report.code) == ("confirmed", 100, "")
    assert box.states(job.id) == [
        *("seen", "verified", "reserved", "fetching", "fetched", "staged", "testing", "trial", "confirmed")
    ]
    assert box.versions.tests == ["tiny:2"]
    assert meant(box) == "2"
    assert box.registry.resolve("tiny:2").files[0].path.read_bytes() == content
    assert box.registry.resolve("tiny:1")
    assert box.journal.floor(MODEL) == 2
    assert sorted(each.name for each in box.blobs.partial_folder.iterdir()) == []
