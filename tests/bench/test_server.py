from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from appliance.bench.client import ask
from appliance.bench.cpu import CpuMeter
from appliance.bench.server import environment_for, running
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings, load_settings


def test_the_server_under_measurement_gets_the_settings_and_listens_on_loopback_only(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, host="0.0.0.0", port=8080, threads=3, require_api_key=True)
    inherited = {"PATH": "/bin", "APPLIANCE_THREADS": "7", "APPLIANCE_QUEUE_SIZE": "1", "APPLIANCE_API_KEY": "secret"}
    environment = environment_for(settings, inherited, max_sequences=16)
    assert environment["PATH"] == "/bin"
    assert "APPLIANCE_API_KEY" not in environment
    effective, _ = load_settings(environment=environment)
    expected = replace(settings, host="127.0.0.1", port=0, require_api_key=False, max_sequences=16)
    assert effective == replace(
        expected,
        shutdown_grace_s=effective.shutdown_grace_s,
        log_format="json",
        data_dir=tmp_path,
        parking_disk_bytes=0,
    )


@pytest.mark.anyio
async def test_a_server_is_measured_and_gone_afterwards(data: Path) -> None:
    async with running(Settings(data_dir=data, model="tiny", context_cells=2048, threads=1)) as server:
        pid = server.process.pid
        meter = CpuMeter(server)
        assert (await ask(server.port, "GET", "/health")).json() == {"status": "ok"}
        assert server.ready_s > 0
        assert server.memory().server > 10_000_000
        assert meter.use().seconds > 0
        assert meter.use().other_cores >= 0
    assert server.process.returncode == 0
    assert not psutil.pid_exists(pid)


@pytest.mark.anyio
async def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExceptionGroup) as caught:
        async with running(Settings(data_dir=tmp_path / "file")):
            pytest.fail("it cannot have started")
    assert caught.group_contains(UnavailableError, match="exit code")
