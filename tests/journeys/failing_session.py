"""`appliance serve` where the session whose input is called `features` does FAILURE after AFTER runs: die or hang.

Nothing in the product can be asked to fail, so the fault is planted from outside, into the real process.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from appliance.__main__ import main
from appliance.engine.onnx.session import OnnxSession

run = OnnxSession.run
runs = itertools.count()


def failing_run(self: OnnxSession, inputs: Any) -> Any:
    if "features" in inputs and next(runs) == int(os.environ["AFTER"]):
        match os.environ["FAILURE"]:
            case "hang":
                time.sleep(3600)
            case "die":
                raise LookupError("planted by a test")
    return run(self, inputs)


if __name__ == "__main__":
    import sys

    sys.argv.insert(1, "serve")
    OnnxSession.run = failing_run  # type: ignore[method-assign]
    main()
