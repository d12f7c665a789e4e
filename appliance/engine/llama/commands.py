"""What the event loop tells a model's thread, and what it hears from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from appliance.core.errors import ApplianceError
from appliance.engine.llama.choice import Choice
from appliance.engine.llama.generation import Event, LlamaGeneration
from appliance.engine.llama.keeper import Outcome
from appliance.engine.llama.lora import DropAdapter, LoadAdapter


@dataclass(frozen=True, slots=True)
class Submit:
    """Start the choices of one request."""

    choices: Sequence[Choice]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget all choices of one request."""

    generation: LlamaGeneration


@dataclass(frozen=True, slots=True)
class Forget:
    """Keep nothing of sessions, whose text was deleted; `done` is called once that is so, on disk too."""

    sessions: Collection[str]
    done: Callable[[ApplianceError | None], None]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the engine runs with, see the settings of the same names; as a command, go on with these checked values."""

    threads: int
    batch_tokens: int
    target_inter_token_latency_s: float


Command = Submit | Cancel | Forget | Runtime | LoadAdapter | DropAdapter | Outcome


@dataclass(frozen=True, slots=True)
class Report:
    """What a step brought: events in order, how full the engine is, how many guesses were checked and were right."""

    events: Sequence[tuple[LlamaGeneration, Event]]
    running: int
    used_cells: int
    draft_tokens: int = 0
    accepted_tokens: int = 0
