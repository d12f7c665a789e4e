"""Wait until a server's /health answers 200, as `quickstart` and `install` do after a start.

Usage: await_health.py URL SECONDS [PID]

Exits 0 when it is healthy, 1 when the time is over, 3 when the process PID has ended; the last two write what was last
heard to standard error.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ENDED = 3


def ask(url: str) -> str:
    """Return an empty text if the server is healthy, else why not."""
    # The certificate is for the box's public name, not for loopback; nothing secret is sent.
    context = ssl._create_unverified_context()  # noqa: S323, SLF001  (see above)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=5) as response:
            response.read()
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code}: {reason(error.read(10_000))}"
    except (OSError, ValueError) as error:
        return str(error)


def reason(body: bytes) -> str:
    """Return the reason in a health document, or the body as it is."""
    try:
        return str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()


def has_ended(process: int) -> bool:
    """Tell whether no process with this id runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def main() -> int:
    """Poll until one of the three ends."""
    url, seconds, *process = sys.argv[1:]
    deadline = time.monotonic() + float(seconds)
    while (heard := ask(url)) != "":
        if process and has_ended(int(process[0])):
            sys.stderr.write("The server has ended.\n")
            return ENDED
        if time.monotonic() > deadline:
            sys.stderr.write(f"No healthy answer from {url} within {seconds} s; the last was: {heard}\n")
            return 1
        time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
