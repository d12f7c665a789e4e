"""What the runs of all responses share."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.agents.compaction import Compaction
from appliance.agents.fitting import Fitting
from appliance.agents.loop import Limits
from appliance.core.clock import Clock
from appliance.core.sessions import Conversations
from appliance.core.types import TextModels
from appliance.observe.metrics import ResponseMetrics

RETRY_S = 1.0
"""Time until something that is busy is asked again, where it does not say itself."""


@dataclass(frozen=True, slots=True)
class Means:
    """What runs work with."""

    models: TextModels
    conversations: Conversations
    metrics: ResponseMetrics
    clock: Clock
    limits: Limits
    fitting: Fitting
    compaction: Compaction
