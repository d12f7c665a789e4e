"""`python -m appliance` and the `appliance` command."""

from __future__ import annotations

import atexit
import gc


def main() -> None:
    """Run the command line; exits the process."""
    from appliance.cli import appliance  # noqa: PLC0415  (keeps `import appliance` free of the command line)

    # When the interpreter takes its modules apart, the garbage collector may crash in msgspec's types (msgspec issue
    # 717), which would turn a clean exit into a signal. Frozen objects are left to the operating system instead.
    atexit.register(gc.freeze)
    appliance()


if __name__ == "__main__":
    main()
