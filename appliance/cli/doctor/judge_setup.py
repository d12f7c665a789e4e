"""What the doctor thinks of the system and the settings: pure judgements, facts in and a finding out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from appliance.cli.doctor.findings import Finding, Status

EARLIEST = 1_760_000_000.0
"""October 2025: this program is younger, so a clock before it is wrong."""

FAR_AHEAD_S = 20 * 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """The data folder, or the nearest folder above it that is there.

    Attributes:
        path: The data folder.
        nearest: It, or the nearest of its parents that exists.
        is_folder: Whether `nearest` is a folder.
        writable: Whether this user may make files in `nearest`.
        owner: The name or number of the owner of `nearest`.
        user: The name or number of this user.
        database_mode: Rights of the database file in octal digits, or "" when there is none.
    """

    path: str
    nearest: str
    is_folder: bool
    writable: bool
    owner: str
    user: str
    database_mode: str


def judge_folder(facts: FolderFacts) -> Finding:
    """Judge the rights on the data folder."""
    whose = f"owned by {facts.owner}, looked at as {facts.user}"
    if not facts.is_folder:
        return Finding(
            "data folder", Status.FAILURE, f"{facts.nearest} is no folder.", "Name another data folder with --data."
        )
    if not facts.writable:
        return Finding(
            "data folder",
            Status.FAILURE,
            f"{facts.nearest} is not writable for this user ({whose}).",
            "Run as its owner, correct the owner with `chown`, or name another data folder with --data.",
        )
    if facts.nearest != facts.path:
        return Finding("data folder", Status.OK, f"{facts.path} will be made in {facts.nearest} ({whose}).")
    if facts.database_mode and not facts.database_mode.endswith("00"):
        return Finding(
            "data folder",
            Status.WARNING,
            f"{facts.path} is writable ({whose}), but others may read its database (mode {facts.database_mode}).",
            "It holds the hashes of API keys: chmod 600 the file appliance.db in it.",
        )
    return Finding("data folder", Status.OK, f"{facts.path} is writable ({whose}).")


def judge_exposure(host: str, *, is_loopback: bool, insecure: bool, has_keys: bool) -> Finding:
    """Judge who can reach the server, given settings that `check_exposure` lets pass."""
    keys = "with API keys" if has_keys else "without an API key"
    if is_loopback:
        return Finding("exposure", Status.OK, f"{host}: only programs on this machine reach it.")
    if insecure:
        return Finding(
            "exposure",
            Status.WARNING,
            f"{host}: others reach it {keys}, and insecure is set.",
            "Make a key (`appliance keys create`), set tls_certificate and tls_key, and take insecure away.",
        )
    return Finding("exposure", Status.OK, f"{host}: others reach it over TLS {keys}.")


def judge_tls(problem: str, key_mode: int) -> Finding:
    """Judge the TLS files: what is wrong with them, or "", and the rights of the private key (`st_mode`)."""
    if problem:
        return Finding(
            "tls",
            Status.FAILURE,
            f"the certificate and its key cannot be used: {problem}.",
            "Both must be PEM files that this user can read, belong together, and be without a password.",
        )
    if key_mode & 0o007:
        return Finding(
            "tls",
            Status.WARNING,
            f"everybody on this machine may read the private key (mode {key_mode & 0o777:03o}).",
            "chmod o= the key file, and make a new key if strangers have been here.",
        )
    return Finding("tls", Status.OK, "the certificate and its key belong together.")


class PortState(StrEnum):
    """What happened when the port was tried."""

    FREE = "free"
    OURS = "ours"
    TAKEN = "taken"
    FORBIDDEN = "forbidden"
    NOT_HERE = "not here"


def judge_port(host: str, port: int, state: PortState) -> Finding:
    """Judge the address to listen on."""
    where = f"{host} port {port}"
    if port == 0:
        return Finding("port", Status.OK, f"a free one on {host} is picked at each start.")
    if state is PortState.TAKEN:
        return Finding(
            "port",
            Status.FAILURE,
            f"{where} is taken by another program.",
            f"Stop it (`ss -ltnp sport = :{port}` names it as root), or set port to another one.",
        )
    if state is PortState.FORBIDDEN:
        return Finding(
            "port",
            Status.FAILURE,
            f"{where} is not allowed to this user.",
            "Set port to one from 1024 on, such as 8080.",
        )
    if state is PortState.NOT_HERE:
        return Finding(
            "port",
            Status.FAILURE,
            f"{host} is no address of this machine.",
            "Set host to one that `ip address` shows, to 127.0.0.1, or to 0.0.0.0 for all.",
        )
    if state is PortState.OURS:
        return Finding("port", Status.OK, f"{where}: an appliance answers there already.")
    return Finding("port", Status.OK, f"{where} is free.")


def judge_clock(now: float, built: float, synchronized: bool | None) -> Finding:
    """Judge the wall clock.

    Args:
        now: What it says, in seconds since 1970.
        built: When this program's files were written, by whatever clock that was.
        synchronized: Whether the kernel knows it to be kept by NTP; None when nobody can tell.
    """
    earliest = max(EARLIEST, min(built, EARLIEST + FAR_AHEAD_S))
    days = abs(now - earliest) / 86_400
    set_it = "Set it (`timedatectl set-time`, or NTP): certificates, logs and the audit depend on it."
    if now < earliest - 86_400:  # a day's grace: a box may have been installed before its clock was put right
        return Finding("clock", Status.WARNING, f"{days:,.0f} days before this program was made.", set_it)
    if now > earliest + FAR_AHEAD_S:
        return Finding("clock", Status.WARNING, f"{days:,.0f} days after this program was made.", set_it)
    if synchronized is False:
        return Finding(
            "clock",
            Status.WARNING,
            "plausible, but nothing keeps it right.",
            "Switch on NTP (`timedatectl set-ntp true`), or compare it by hand now and then.",
        )
    return Finding("clock", Status.OK, "plausible and kept by NTP." if synchronized else "plausible.")


def judge_systemd(is_running: bool) -> Finding:
    """Judge whether systemd can start the appliance and keep it running."""
    if is_running:
        return Finding("systemd", Status.OK, "manages this machine.")
    return Finding(
        "systemd",
        Status.WARNING,
        "does not manage this machine.",
        "Nothing restarts the appliance after a crash or at boot; see to it that something runs `appliance serve`.",
    )


def judge_threads(threads: int, cores: int) -> Finding:
    """Judge the setting `threads`, where 0 is one a physical core."""
    if threads > cores:
        return Finding(
            "threads",
            Status.WARNING,
            f"{threads} on {cores} usable physical core{'s' if cores != 1 else ''}.",
            "More threads than cores slow each other down: set threads to 0.",
        )
    return Finding(
        "threads", Status.OK, f"{threads or cores} on {cores} usable physical core{'s' if cores != 1 else ''}."
    )


def judge_open_files(limit: int, connections: int) -> Finding:
    """Judge the limit of open files (`ulimit -n`) against the setting `max_connections`."""
    needed = connections + 128
    found = f"{limit} may be open, {needed} are needed for {connections} connections."
    if limit < needed:
        return Finding(
            "open files",
            Status.WARNING,
            found,
            "Raise the limit (`ulimit -n`, or LimitNOFILE= in the unit), or lower max_connections.",
        )
    return Finding("open files", Status.OK, found)


def judge_sqlite(version: tuple[int, ...], oldest: tuple[int, ...]) -> Finding:
    """Judge the SQLite library."""
    if version < oldest:
        return Finding(
            "sqlite",
            Status.FAILURE,
            f"{_dotted(version)}; {_dotted(oldest)} is needed.",
            "Use a newer Python or distribution: Debian 12, Ubuntu 22.04 or JetPack 6 will do.",
        )
    return Finding("sqlite", Status.OK, f"{_dotted(version)}.")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
