"""Where the doctor looks: each function reads one fact of this machine and changes nothing."""

from __future__ import annotations

import errno
import http.client
import json
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import appliance
from appliance.cli.doctor.judge_setup import FolderFacts, PortState
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings

_LLAMA_FEATURES = {
    "AVX": "AVX",
    "AVX2": "AVX2",
    "FMA": "FMA",
    "F16C": "F16C",
    "AVX512": "AVX-512",
    "AVX_VNNI": "AVX-VNNI",
    "AVX512_VNNI": "AVX-512-VNNI",
    "AVX512_BF16": "AVX-512-BF16",
    "AMX_INT8": "AMX",
    "NEON": "NEON",
    "DOTPROD": "dotprod",
    "MATMUL_INT8": "i8mm",
    "SVE": "SVE",
}
"""As `llama_print_system_info` names what it was compiled for."""

_ASK_LLAMA = """
import json, llama_cpp
print(json.dumps([
    llama_cpp.__version__, llama_cpp.llama_print_system_info().decode(), llama_cpp.llama_supports_gpu_offload()
]))
"""

_LLAMA_TIMEOUT_S = 120.0
_HEALTH_TIMEOUT_S = 3.0
_PROGRAM_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Llama:
    """What llama.cpp says of itself."""

    version: str
    features: frozenset[str]
    uses_gpu: bool


def llama() -> Llama:
    """Ask llama.cpp in a process of its own: compiled for another CPU, it would take this one down.

    Raises:
        UnavailableError: It cannot be imported, or dies.
    """
    advice = "Compile it here: install again with firmware_scripts/quickstart or firmware_scripts/install."
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_LLAMA], capture_output=True, text=True, timeout=_LLAMA_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"llama.cpp did not load within {_LLAMA_TIMEOUT_S:.0f} s.", advice=advice) from error
    if answer.returncode < 0:
        raise UnavailableError(
            f"llama.cpp was killed by signal {-answer.returncode} when it was loaded: it is not for this CPU.",
            advice=advice,
        )
    if answer.returncode > 0:
        last = (answer.stderr.strip() or "no message").splitlines()[-1]
        raise UnavailableError(f"llama.cpp cannot be loaded: {last}.", advice=advice)
    version, information, uses_gpu = json.loads(answer.stdout.splitlines()[-1])
    return Llama(version, compiled_features(information), uses_gpu)


def compiled_features(system_information: str) -> frozenset[str]:
    """Return the features in `llama_print_system_info`'s answer, such as `CPU : AVX2 = 1 | FMA = 1 | `."""
    found = set()
    for part in system_information.split("|"):
        name, _, value = part.rpartition(":")[2].partition("=")
        if value.strip() == "1" and name.strip() in _LLAMA_FEATURES:
            found.add(_LLAMA_FEATURES[name.strip()])
    return frozenset(found)


def folder(path: Path) -> FolderFacts:
    """Look at the data folder.

    Raises:
        OSError: Not even the folders above it can be looked at.
    """
    nearest = next(each for each in (path, *path.parents) if each.exists())
    database = path / "appliance.db"
    return FolderFacts(
        path=str(path),
        nearest=str(nearest),
        is_folder=nearest.is_dir(),
        writable=os.access(nearest, os.W_OK | os.X_OK),
        owner=_user(nearest.stat().st_uid),
        user=_user(os.geteuid()),
        database_mode=f"{database.stat().st_mode & 0o777:03o}" if database.exists() else "",
    )


def port(settings: Settings) -> PortState:
    """Try to listen where the server will; if that fails because it is taken, ask who is there.

    Raises:
        OSError: The network could not be asked.
    """
    try:
        addresses = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as attempt:
                attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                attempt.bind(address)
                attempt.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return PortState.OURS if is_appliance(settings) else PortState.TAKEN
        if error.errno in {errno.EACCES, errno.EPERM}:
            return PortState.FORBIDDEN
        if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT} or isinstance(error, socket.gaierror):
            return PortState.NOT_HERE
        raise
    return PortState.FREE


def is_appliance(settings: Settings) -> bool:
    """Ask whoever listens on the port for /health, and tell whether an appliance answers."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104  (read, not listened on)
    connection = http.client.HTTPConnection(host, settings.port, timeout=_HEALTH_TIMEOUT_S)
    if settings.tls_certificate is not None:
        # The certificate is for the box's public name; the answer is only compared, and nothing secret is sent.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, settings.port, timeout=_HEALTH_TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/health")
        document: Any = json.loads(connection.getresponse().read(10_000))
    except (OSError, http.client.HTTPException, ValueError):
        return False  # whatever it is, it is no appliance in its right mind
    finally:
        connection.close()
    return isinstance(document, dict) and document.get("status") in ("ok", "unavailable")


def tls_problem(certificate: Path, key: Path) -> str:
    """Return why the two files do not make a TLS server, or "" when they do."""
    try:
        # An empty password makes an encrypted key an error; without it OpenSSL would ask at the terminal and wait.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def built() -> float:
    """Return when the newest file of this program was written, in seconds since 1970."""
    return max(each.stat().st_mtime for each in Path(appliance.__file__).parent.rglob("*.py"))


def clock_is_synchronized() -> bool | None:
    """Return whether the kernel counts its clock as kept by NTP, or None when systemd cannot tell."""
    program = shutil.which("timedatectl")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, "show", "--property=NTPSynchronized", "--value"],
            capture_output=True,
            text=True,
            timeout=_PROGRAM_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no systemd runs here, as in a container
    return {"yes": True, "no": False}.get(answer.stdout.strip())


def systemd_runs() -> bool:
    """Return whether systemd is this machine's first process (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
