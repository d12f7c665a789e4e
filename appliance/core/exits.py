"""How a process of ours ends."""

from __future__ import annotations

import atexit
import gc


def leave_memory_to_the_system() -> None:
    """Have the interpreter's last garbage collection leave alone what there is by then.

    When the interpreter takes its modules apart, that collection may crash in msgspec's types (msgspec issue 717),
    which would turn a clean exit into a signal. To be called first thing in every program that imports msgspec.
    """
    atexit.register(gc.freeze)
