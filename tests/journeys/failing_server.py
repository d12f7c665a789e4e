"""`appliance serve` whose engine takes STEP_S seconds more a step, and after AFTER steps does FAILURE: die or hang.

Its end is waited for STOP_S seconds, if that is given. Nothing in the product can be asked to fail, so the fault is
planted from outside, into the real process.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from appliance.__main__ import main
from appliance.engine.llama import engine
from appliance.engine.llama.context import LlamaContext

decode = LlamaContext.decode
steps = itertools.count()


def failing_decode(self: LlamaContext, runs: Any) -> int:
    time.sleep(float(os.environ.get("STEP_S", "0")))
    if next(steps) >= int(os.environ["AFTER"]):
        match os.environ["FAILURE"]:
            case "hang":
                time.sleep(3600)
            case "die":
                raise MemoryError("planted by a test")
    return decode(self, runs)


if __name__ == "__main__":
    import sys

    sys.argv.insert(1, "serve")
    engine.STOP_TIMEOUT_S = float(os.environ.get("STOP_S", engine.STOP_TIMEOUT_S))
    LlamaContext.decode = failing_decode  # type: ignore[method-assign]
    main()
