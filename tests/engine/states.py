"""States to park, the same each time but for their ids; used by the tests and by the processes that they kill."""

from __future__ import annotations

from array import array

import numpy as np

from appliance.engine.llama.state_files import Payload, new_id
from appliance.engine.llama.state_format import Origin, StateHead

ORIGIN = Origin("ab" * 32, "0.3.36", 8192, "f16", "f16", flash_attention=False, full_window=True)
FINGERPRINT = ORIGIN.fingerprint


def state(seed: int = 0, *, size: int = 5000, tokens: int = 40, space: str = "") -> tuple[StateHead, Payload]:
    """Return a state with random tokens and a random payload of `size` bytes."""
    random = np.random.default_rng(seed)
    payload = random.integers(0, 256, size, dtype=np.uint8)
    ids = array("i", random.integers(0, 50_000, tokens).astype(np.int32).tobytes())
    return StateHead(new_id(), space, ids, size), payload
