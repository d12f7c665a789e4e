#!/usr/bin/env python3
"""What happens to an installed service in the field, tried in a booted system; writes the facts as /results/facts.json.

Runs as root inside `tests/system/boot`, with the system's own Python and nothing but its standard library. It only
acts and records; the tests in `test_service.py` judge.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path("/results")
CHECKOUTS = RESULTS / "checkouts"
URL = "http://127.0.0.1:8080"
UNIT = "appliance.service"
DEADLINE_S = 60.0

facts: dict[str, Any] = {}


def run(*command: str | Path) -> dict[str, Any]:
    """Run a program to its end; return its exit code and all that it wrote."""
    result = subprocess.run(
        [str(each) for each in command],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    return {"code": result.returncode, "output": result.stdout + result.stderr}


def install(checkout: str, *options: str) -> dict[str, Any]:
    """Run a checkout's install, with its environment made beforehand: there is no package index here."""
    run("cp", "--archive", "--no-clobber", RESULTS / "releases", "/opt/appliance/")
    return run(CHECKOUTS / checkout / "firmware_scripts" / "install", *options)


def unit() -> dict[str, str]:
    """Return what systemd knows of the service."""
    names = "ActiveState,SubState,StatusText,MainPID,NRestarts,Result,User"
    shown: str = run("systemctl", "show", UNIT, f"--property={names}")["output"]
    return dict(line.split("=", 1) for line in shown.splitlines())


def healthy() -> bool:
    """Tell whether /health answers 200 now."""
    try:
        with urllib.request.urlopen(URL + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def await_that(fact: Callable[[], bool]) -> bool:
    """Wait until the fact holds; return whether it did before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def ask() -> str:
    """Return the model's answer to a question, or the error's text."""
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        "temperature": 0,
        "max_tokens": 20,
    }
    request = urllib.request.Request(
        URL + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        return error.read().decode()


def process_status(process: str) -> dict[str, str]:
    """Return the lines of /proc/PID/status as a table."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def keys() -> str:
    """Return the names of the API keys, as the service's user sees them."""
    program = "/opt/appliance/venv/bin/appliance"
    return str(
        run("runuser", "-u", "appliance", "--", program, "keys", "list", "--data", "/var/lib/appliance")["output"]
    )


def version() -> str:
    """Return the installed program's version."""
    return str(run("/opt/appliance/venv/bin/appliance", "--version")["output"]).strip()


def first_installation() -> None:
    """Install, ask, and install again."""
    Path("/opt/appliance").mkdir(parents=True)
    facts["install"] = install("good")
    facts["unit"] = unit()
    facts["answer"] = ask()
    facts["status"] = process_status(unit()["MainPID"])
    facts["journal"] = run("journalctl", "--unit", UNIT, "--output", "cat", "--no-pager")["output"]
    before = unit()
    facts["install again"] = install("good")
    facts["restarted by installing again"] = unit()["MainPID"] != before["MainPID"]


def failures() -> None:
    """Kill the process, then let it hang."""
    before = unit()
    os.kill(int(before["MainPID"]), signal.SIGKILL)
    await_that(lambda: unit()["MainPID"] not in {"0", before["MainPID"]} and unit()["ActiveState"] == "active")
    facts["after a kill"] = {"unit": unit(), "healthy": await_that(healthy)}

    drop_in = Path("/run/systemd/system/appliance.service.d/watchdog.conf")
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text("[Service]\nWatchdogSec=3\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    await_that(healthy)
    before = unit()
    os.kill(int(before["MainPID"]), signal.SIGSTOP)
    await_that(lambda: unit()["MainPID"] not in {"0", before["MainPID"]} and unit()["ActiveState"] == "active")
    facts["after a hang"] = {"unit": unit(), "healthy": await_that(healthy)}
    facts["watchdog"] = run("journalctl", "--unit", UNIT, "--no-pager", "--grep", "Watchdog timeout")["output"]
    drop_in.unlink()
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    await_that(healthy)


def upgrades() -> None:
    """Upgrade to a better version, then to one that cannot start."""
    settings = Path("/etc/appliance/appliance.toml")
    settings.write_text(settings.read_text() + 'log_level = "debug"\n')
    program = "/opt/appliance/venv/bin/appliance"
    run("runuser", "-u", "appliance", "--", program, "keys", "create", "kept", "--data", "/var/lib/appliance")
    facts["before the upgrade"] = {"version": version(), "keys": keys()}
    facts["upgrade"] = install("better")
    facts["after the upgrade"] = {
        "version": version(),
        "keys": keys(),
        "settings": settings.read_text(),
        "answer": ask(),
    }
    facts["bad upgrade"] = install("broken")
    facts["after the bad upgrade"] = {
        "version": version(), "keys": keys(), "settings": settings.read_text(), "healthy": healthy(), "unit": unit()
    }  # fmt: skip


def the_end() -> None:
    """Stop, uninstall, purge."""
    run("systemctl", "stop", UNIT)
    facts["stopped"] = unit()
    script = CHECKOUTS / "good" / "firmware_scripts" / "uninstall"
    places = ("/opt/appliance", "/etc/systemd/system/appliance.service", "/etc/appliance", "/var/lib/appliance")
    for step, options in (("uninstall", ()), ("uninstall again", ()), ("purge", ("--purge",))):
        facts[step] = run(script, *options) | {
            "left": [place for place in places if Path(place).exists()],
            "user": run("getent", "passwd", "appliance")["code"] == 0,
        }


def main() -> None:
    """Go through it all; what was recorded until a step fails is kept."""
    try:
        for step in (first_installation, failures, upgrades, the_end):
            step()
    finally:
        (RESULTS / "facts.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
