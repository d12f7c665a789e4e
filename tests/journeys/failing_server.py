"""`appliance serve` whose engine fails on purpose: FAILURE is die, hang or slow, after AFTER steps.

Nothing in the product can be asked to fail, so the fault is planted from outside, into the real process.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from appliance.__main__ import main
from appliance.engine.llama.context import LlamaContext

decode = LlamaContext.decode
steps = itertools.count()


def failing_decode(self: LlamaContext, runs: Any) -> int:
    if next(steps) >= int(os.environ["AFTER"]):
        match os.environ["FAILURE"]:
            case "hang":
                time.sleep(3600)
            case "slow":
                time.sleep(0.05)
            case _:
                raise MemoryError("planted by a test")
    return decode(self, runs)


if __name__ == "__main__":
    import sys

    sys.argv.insert(1, "serve")
    LlamaContext.decode = failing_decode  # type: ignore[method-assign]
    main()
