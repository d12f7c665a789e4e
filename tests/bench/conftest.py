"""A data folder with a tiny model, and the command line run on it as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from appliance.core.settings import Settings
from appliance.registry.install import import_model
from appliance.registry.versions import open_registry
from appliance.store.database import Database

DEADLINE_S = 90.0


@dataclass(frozen=True)
class Bench:
    """`appliance bench` on a data folder."""

    data: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "appliance", "bench", *arguments, "--data", str(self.data)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            env={**os.environ, "APPLIANCE_MODEL": "tiny", "APPLIANCE_CONTEXT_CELLS": "2048", "APPLIANCE_THREADS": "1"},
        )

    def report(self, *arguments: str) -> dict[str, Any]:
        result = self.run("--quick", "--json", *arguments)
        assert result.returncode == 0, result.stderr
        report: dict[str, Any] = json.loads(result.stdout)
        return report


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    settings = Settings(data_dir=folder)
    database = Database(settings.database_path)
    import_model(tiny_model_path, open_registry(settings, database), name="tiny", licence="Apache-2.0")
    database.close()
    return folder


@pytest.fixture(scope="session")
def bench(data: Path) -> Bench:
    return Bench(data)
