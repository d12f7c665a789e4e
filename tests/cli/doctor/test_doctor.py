from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from appliance.cli.doctor import command, probes
from appliance.core.clock import SystemClock
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings
from appliance.observe import resources
from appliance.observe.resources import Disk, Memory
from appliance.registry.install import import_adapter, import_model
from appliance.registry.versions import open_registry
from appliance.security.keys import KeyStore
from appliance.store.database import Database
from tests.tiny_gguf import write_tiny_lora

LOOKS = [
    "cpu",
    "memory",
    "data folder",
    "disk",
    "sqlite",
    "database",
    "llama.cpp",
    "gpu",
    "model",
    "threads",
    "exposure",
    "tls",
    "port",
    "open files",
    "clock",
    "systemd",
]


@pytest.fixture(autouse=True)
def ample_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the figures of the machine that runs the tests not decide them."""
    monkeypatch.setattr(resources, "memory", lambda: Memory(8 * 10**9, 6 * 10**9))
    monkeypatch.setattr(resources, "disk", lambda _: Disk(10**12, 10**11))
    monkeypatch.setattr(probes, "llama", lambda: probes.Llama("0.3.36", resources.cpu_features(), uses_gpu=False))


@pytest.fixture
def data(tmp_path: Path, tiny_model_path: Path) -> Path:
    folder = tmp_path / "data"
    with closing(Database(folder / "appliance.db")) as database:
        import_model(tiny_model_path, open_registry(Settings(data_dir=folder), database), name="tiny")
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(
        command,
        ["--data", str(folder), *arguments],
        env={"APPLIANCE_PORT": "0", "APPLIANCE_MODEL": "tiny", **environment},
    )


def examine(folder: Path, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = run(folder, "--json", **environment)
    document = json.loads(result.stdout)
    findings = {each["name"]: each for each in document["findings"]}
    assert list(findings) == LOOKS
    assert document["fit"] == (result.exit_code == 0) == all(each["status"] != "failure" for each in findings.values())
    return result.exit_code, findings


def test_an_adapter_can_be_the_model_and_needs_memory_beside_its_base(
    data: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", tiny_model_path)
    with closing(Database(data / "appliance.db")) as database:
        registry = open_registry(Settings(data_dir=data), database)
        import_adapter(path, registry, base="tiny", name="legal")
    code, findings = examine(data, APPLIANCE_MODEL="tiny:legal")
    assert code == 0
    assert "tiny:1:legal" in findings["model"]["found"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in folder.rglob("*") if each.is_file() and "-shm" not in each.name}


def test_a_fit_machine_passes_and_nothing_is_changed(data: Path) -> None:
    before = snapshot(data)
    code, findings = examine(data)
    assert code == 0
    assert findings["model"]["status"] == "ok"
    assert "tiny:1 with 8,192 context cells needs" in findings["model"]["found"]
    assert "1 models, 1 model files" in findings["database"]["found"]
    after = snapshot(data)
    assert {name: content for name, content in after.items() if content} == before


def test_smaller_kv_cells_need_less_memory(data: Path) -> None:
    def found(kind: str) -> str:
        _, findings = examine(data, APPLIANCE_KV_CACHE_TYPE=kind, APPLIANCE_CONTEXT_CELLS="1000000")
        return str(findings["model"]["found"])

    assert "needs 356 MB" in found("f16")  # 256 bytes a cell
    assert "needs 236 MB" in found("q8_0")
    assert "needs 172 MB" in found("q4_0")


def test_people_read_lines_with_advice_below_and_a_verdict(data: Path) -> None:
    result = run(data, APPLIANCE_THREADS="999")
    lines = result.stdout.splitlines()
    warning = next(number for number, line in enumerate(lines) if line.startswith("warning  threads"))
    assert lines[warning + 1].strip() == "→ More threads than cores slow each other down: set threads to 0."
    assert lines[-1].startswith("This machine is fit to serve: ")
    assert result.exit_code == 0


def test_a_new_box_is_fit_and_its_data_folder_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "made"
    code, findings = examine(folder, APPLIANCE_MODEL="smollm2-135m-instruct")
    assert code == 0
    assert findings["model"]["status"] == "warning"
    assert findings["model"]["advice"] == "Fetch it: appliance models pull smollm2-135m-instruct"
    assert "of which the model will take 98 MB" in findings["disk"]["found"]
    assert "none yet" in findings["database"]["found"]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_too_big_for_the_box_fails(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory", lambda: Memory(10**9, 10**9))
    assert examine(data)[1]["model"]["status"] == "ok"
    code, findings = examine(data, APPLIANCE_CONTEXT_CELLS=str(2**24))
    assert code == 1
    assert findings["model"]["status"] == "failure"
    assert "16,777,216 context cells" in findings["model"]["found"]


def test_a_model_that_nobody_knows_fails(data: Path) -> None:
    code, findings = examine(data, APPLIANCE_MODEL="unheard-of")
    assert code == 1
    assert "'unheard-of'" in findings["model"]["found"]


def test_no_model_at_start_is_fine(data: Path) -> None:
    assert examine(data, APPLIANCE_MODEL="")[1]["model"]["status"] == "ok"


def test_a_model_file_that_is_gone_fails(data: Path) -> None:
    for blob in (data / "models" / "blobs").iterdir():
        blob.unlink()
    code, findings = examine(data)
    assert code == 1
    assert findings["model"]["status"] == "failure"


def test_a_damaged_database_fails_and_the_rest_is_still_looked_at(data: Path) -> None:
    (data / "appliance.db").write_bytes(b"not a database at all " * 100)
    code, findings = examine(data)
    assert code == 1
    assert findings["database"]["status"] == "failure"
    assert "backup" in findings["database"]["advice"]
    assert findings["systemd"]["found"]


def test_a_damaged_page_fails(data: Path) -> None:
    path = data / "appliance.db"
    with closing(Database(path)) as database:
        insert = "INSERT INTO audit (at, actor, action, subject, detail) VALUES (0, '', '', ?, '')"
        database.write_blocking(lambda connection: connection.execute(insert, ("x" * 200_000,)).rowcount)
    content = bytearray(path.read_bytes())
    content[-4096:] = b"\xff" * 4096
    path.write_bytes(content)
    code, findings = examine(data)
    assert code == 1
    assert "is damaged" in findings["database"]["found"]


def test_a_schema_that_the_next_start_upgrades_is_fine(tmp_path: Path) -> None:
    (tmp_path / "appliance.db").touch(0o600)
    findings = examine(tmp_path, APPLIANCE_MODEL="")[1]
    assert findings["database"]["status"] == "ok"
    assert "at the next start" in findings["database"]["found"]


def test_a_llama_cpp_for_another_cpu_fails_and_the_gpu_is_still_looked_at(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> probes.Llama:
        raise UnavailableError("llama.cpp was killed by signal 4.", advice="Compile it here.")

    monkeypatch.setattr(probes, "llama", die)
    code, findings = examine(data)
    assert code == 1
    assert findings["llama.cpp"]["status"] == "failure"
    assert findings["gpu"]["found"]


def test_listening_to_others_needs_keys_and_tls(data: Path, tmp_path: Path) -> None:
    code, findings = examine(data, APPLIANCE_HOST="0.0.0.0")
    assert code == 1
    assert findings["exposure"]["status"] == "failure"
    assert "keys create" in findings["exposure"]["advice"]
    code, findings = examine(data, APPLIANCE_HOST="0.0.0.0", APPLIANCE_INSECURE="true")
    assert (code, findings["exposure"]["status"]) == (0, "warning")
    with closing(Database(data / "appliance.db")) as database:
        KeyStore(database, SystemClock()).create("camera", ["inference"])
    pem = str(tmp_path / "missing.pem")
    code, findings = examine(data, APPLIANCE_HOST="0.0.0.0", APPLIANCE_TLS_CERTIFICATE=pem, APPLIANCE_TLS_KEY=pem)
    assert (code, findings["exposure"]["status"], findings["tls"]["status"]) == (1, "ok", "failure")
    assert "over TLS with API keys" in findings["exposure"]["found"]


def examine_with_a_users_rights(folder: Path) -> dict[str, dict[str, Any]]:
    """Run the doctor as a process that must obey the rights of files, even if it is root's."""
    obedient = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if obedient and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to take root's rights away")
    result = subprocess.run(
        [*obedient, sys.executable, "-m", "appliance", "doctor", "--data", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "APPLIANCE_PORT": "0", "APPLIANCE_MODEL": ""},
    )
    assert result.returncode == 1, result.stderr
    return {each["name"]: each for each in json.loads(result.stdout)["findings"]}


def test_a_folder_that_this_user_may_not_write_to_fails_with_advice(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(0o555)
    finding = examine_with_a_users_rights(folder)["data folder"]
    assert finding["status"] == "failure"
    assert "not writable for this user" in finding["found"]
    assert "chown" in finding["advice"]


def test_a_folder_that_this_user_may_not_look_into_fails_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(0)
    try:
        findings = examine_with_a_users_rights(hidden / "data")
    finally:
        hidden.chmod(0o700)
    assert findings["data folder"]["status"] == "failure"
    assert "Permission denied" in findings["data folder"]["found"]
    assert findings["llama.cpp"]["status"] != "failure"
    assert list(hidden.iterdir()) == []


def test_settings_that_do_not_load_are_told_before_any_look(tmp_path: Path) -> None:
    result = run(tmp_path, APPLIANCE_PORT="many")
    assert (result.exit_code, result.stdout) == (2, "")
