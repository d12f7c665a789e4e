"""The diagnostics bundle fits into a reply, whatever was logged, and the rest is on the box."""

from __future__ import annotations

import gzip
import logging
import random
from pathlib import Path

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.fleet import LARGEST_DOCUMENT_BYTES, CommandResult
from appliance.core.settings import load_settings
from appliance.core.types import Health
from appliance.fleet.diagnostics import FILE_NAME, DiagnosticsSources, diagnostics, unpack
from appliance.observe.log_ring import LogRing


class Well:
    def health(self) -> Health:
        return Health(ready=True)


def sources(tmp_path: Path, lines: int) -> DiagnosticsSources:
    settings, effective = load_settings(flags={"data_dir": tmp_path}, environment={})
    ring, chance = LogRing(), random.Random(1)
    for number in range(lines):
        noise = chance.randbytes(400).hex()  # which nothing can pack
        ring.handle(logging.LogRecord("appliance", logging.INFO, "", 0, "%d %s", (number, noise), None))
    return DiagnosticsSources(settings, effective, Well(), list, ring, SystemClock())


def size(result: dict[str, object]) -> int:
    return len(msgspec.json.encode(CommandResult("x" * 128, ok=True, result=result)))


def test_a_small_bundle_is_whole_and_leaves_no_file(tmp_path: Path) -> None:
    result = diagnostics(sources(tmp_path, 20))
    assert (result["lines"], result["lines_left_out"]) == (20, 0)
    assert len(unpack(result)["log"]) == 20
    assert not (tmp_path / FILE_NAME).exists()
    assert size(result) <= LARGEST_DOCUMENT_BYTES


def test_of_a_large_one_the_newest_lines_are_sent_and_all_are_in_a_file(tmp_path: Path) -> None:
    result = diagnostics(sources(tmp_path, 900))
    sent = [each["message"].split()[0] for each in unpack(result)["log"]]
    assert sent == [str(n) for n in range(900 - len(sent), 900)]
    assert 20 < len(sent) < 900
    assert result["lines_left_out"] == 900 - len(sent)
    assert size(result) <= LARGEST_DOCUMENT_BYTES
    file = Path(result["file"])
    assert file.stat().st_mode & 0o077 == 0, "only the service's own user may read it"
    assert len(msgspec.json.decode(gzip.decompress(file.read_bytes()))["log"]) == 900


def test_a_disk_that_cannot_be_looked_at_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_folder: Path) -> None:
        raise OSError("gone")

    monkeypatch.setattr("appliance.fleet.diagnostics.disk", fail)
    assert unpack(diagnostics(sources(tmp_path, 1)))["resources"]["disk"] == {"error": "OSError"}
