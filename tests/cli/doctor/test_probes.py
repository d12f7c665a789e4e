from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.cli.doctor import probes
from appliance.cli.doctor.judge_setup import PortState
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings
from appliance.observe.resources import cpu_features


def settings(port: int, host: str = "127.0.0.1") -> Settings:
    return Settings(host=host, port=port)


@contextmanager
def serving(answer: bytes, tls: tuple[Path, Path] | None = None) -> Iterator[int]:
    """Answer every GET with the bytes, on a port of our own; over TLS with a certificate and its key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(30)


# llama.cpp


def test_llama_cpp_here_is_compiled_for_nothing_that_this_cpu_lacks() -> None:
    found = probes.llama()
    assert found.version[0].isdecimal()
    assert found.features <= cpu_features()


def test_the_features_are_read_from_every_backends_part() -> None:
    text = "CUDA : ARCHS = 870 | CPU : AVX2 = 1 | AVX512 = 0 | FMA = 1 | LLAMAFILE = 1 | DOTPROD = 1 | nonsense | = 1 |"
    assert probes.compiled_features(text) == {"AVX2", "FMA", "dotprod"}
    assert probes.compiled_features("") == frozenset()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -ILL $$", "killed by signal 4"),
        ("echo 'ImportError: libcudart.so.12: no such file' >&2; exit 1", "libcudart.so.12: no such file"),
        ("exit 1", "no message"),
        ("exec sleep 60", "did not load within"),
    ],
)
def test_a_llama_cpp_that_does_not_load_is_told_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(probes, "_LLAMA_TIMEOUT_S", 0.2 if "sleep" in script else 30.0)
    with pytest.raises(UnavailableError, match=words) as refusal:
        probes.llama()
    assert "Compile it here" in refusal.value.advice


# Data folder


def test_a_folder_that_is_not_there_is_judged_by_its_parent_and_not_made(tmp_path: Path) -> None:
    facts = probes.folder(tmp_path / "a" / "b")
    assert (facts.path, facts.nearest) == (str(tmp_path / "a" / "b"), str(tmp_path))
    assert (facts.is_folder, facts.writable, facts.database_mode) == (True, True, "")
    assert list(tmp_path.iterdir()) == []


def test_the_databases_rights_are_read(tmp_path: Path) -> None:
    (tmp_path / "appliance.db").touch(0o640)
    (tmp_path / "appliance.db").chmod(0o640)
    assert probes.folder(tmp_path).database_mode == "640"


def test_an_owner_without_a_name_is_told_by_number() -> None:
    assert probes._user(987_654_321) == "987654321"
    assert probes._user(0) == "root"


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    assert not probes.folder(tmp_path / "data").is_folder


# Port


def test_a_free_port_is_free_and_stays_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        number = probe.getsockname()[1]
    assert probes.port(settings(number)) is PortState.FREE
    with socket.create_server(("127.0.0.1", number)):
        pass


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (b'{"status":"unavailable","reason":"loading"}', PortState.OURS),
        (b'{"status":"ok"}', PortState.OURS),
        (b'{"status":"fine"}', PortState.TAKEN),
        (b"[]", PortState.TAKEN),
        (b"<html>", PortState.TAKEN),
        (b"\xff", PortState.TAKEN),
    ],
)
def test_an_appliance_on_the_port_is_told_from_another_program(answer: bytes, state: PortState) -> None:
    with serving(answer) as port:
        assert probes.port(settings(port)) is state


def test_a_program_that_takes_connections_and_says_nothing_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_HEALTH_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert probes.port(settings(silent.getsockname()[1])) is PortState.TAKEN


def test_a_program_on_every_address_is_asked_over_loopback() -> None:
    with serving(b'{"status":"ok"}') as port:
        assert probes.is_appliance(settings(port, "0.0.0.0"))


def test_an_address_of_another_machine_is_not_here() -> None:
    assert probes.port(settings(0, "192.0.2.1")) is PortState.NOT_HERE


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a process without root's rights")
def test_a_port_below_1024_is_forbidden_without_the_right_to_it() -> None:
    program = (
        "import os, sys; from appliance.cli.doctor import probes; from appliance.core.settings import Settings;"
        "print(probes.port(Settings(port=81)))"
    )
    limit = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip()
    if int(limit) <= 81:
        pytest.skip(f"this system lets every user listen from port {limit} on")
    command = ["unshare", "--user", sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if "unshare failed" in result.stderr:
        pytest.skip("this system lets no user make a namespace of his own")
    assert result.stdout == "forbidden\n", result.stderr


# TLS


def test_tls_files_that_do_not_work_are_told(tmp_path: Path) -> None:
    assert "No such file" in probes.tls_problem(tmp_path / "chain.pem", tmp_path / "key.pem")
    (tmp_path / "chain.pem").write_text("nonsense")
    assert probes.tls_problem(tmp_path / "chain.pem", tmp_path / "chain.pem") != ""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program to make a certificate")
def test_a_certificate_and_its_key_work_and_are_asked_over_tls(tmp_path: Path) -> None:
    chain, key, other = (tmp_path / name for name in ("chain.pem", "key.pem", "other.pem"))
    for each, made in ((key, chain), (other, tmp_path / "unused.pem")):
        request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        subprocess.run(
            [*request, "-keyout", str(each), "-out", str(made), "-subj", "/CN=box", "-days", "2"],
            check=True,
            capture_output=True,
            timeout=30,
        )
    assert probes.tls_problem(chain, key) == ""
    assert "mismatch" in probes.tls_problem(chain, other)
    with serving(b'{"status":"ok"}', (chain, key)) as port:
        box = Settings(port=port, tls_certificate=chain, tls_key=key)
        assert probes.port(box) is PortState.OURS


# Clock and systemd


def test_the_program_was_built_in_the_past() -> None:
    assert 1.7e9 < probes.built() <= time.time() + 86_400


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo yes", True),
        ("echo no", False),
        ("echo maybe", None),
        ("exit 1", None),
        ("exec sleep 60", None),
        (None, None),
    ],
)
def test_systemd_is_asked_whether_the_clock_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: bool | None
) -> None:
    for name in ("sh", "sleep"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    if script is not None:
        (tmp_path / "timedatectl").write_text(f"#!{tmp_path}/sh\n{script}\n")
        (tmp_path / "timedatectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(probes, "_PROGRAM_TIMEOUT_S", 0.2 if script and "sleep" in script else 30.0)
    assert probes.clock_is_synchronized() is expected


def test_systemd_runs_where_its_folder_is() -> None:
    assert probes.systemd_runs() == Path("/run/systemd/system").is_dir()
