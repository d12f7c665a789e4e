"""One choice while the worker's thread generates it: from sampled tokens to deltas."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from appliance.core.types import Delta, FinishReason, Priority, SamplingParams, TokenLogprob
from appliance.engine.llama.constraint import Constraint
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.sampling import Sampler
from appliance.engine.llama.step import Sequence
from appliance.engine.llama.text import TextAssembler

if TYPE_CHECKING:
    from appliance.engine.llama.generation import LlamaGeneration


@dataclass(eq=False, slots=True)
class Choice:
    """A choice as it was submitted; `start` adds what only the worker's thread may own."""

    generation: LlamaGeneration
    index: int
    prompt: array[int]
    sampling: SamplingParams
    priority: Priority
    token_limit: int
    arrived: float
    tenant: str = ""
    weight: float = 1.0
    deadline: float | None = None
    adapter: str = ""
    pinned: bool = False
    session: str = ""
    kept: bool = True
    constraint: Constraint | None = None


@dataclass(eq=False, slots=True)
class RunningChoice:
    """A choice with its sampler and its text so far.

    A token's log probability is sent with the text it belongs to: tokens whose text is held back wait, and those that
    turn out to belong to a stop string are never sent.
    """

    choice: Choice
    sequence: Sequence
    sampler: Sampler
    assembler: TextAssembler
    generated: int = 0
    _unsent_tokens: int = 0
    _logprobs: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)

    @classmethod
    def start(cls, choice: Choice, number: int, model: LlamaModel) -> RunningChoice:
        """Make the scheduler's sequence, the native sampler and the text assembler for a choice."""
        sequence = Sequence(
            number,
            array("i", choice.prompt),
            choice.priority,
            choice.arrived,
            tenant=choice.tenant,
            weight=choice.weight,
            deadline=choice.deadline,
            token_limit=choice.token_limit,
            adapter=choice.adapter,
            session=choice.session,
            kept=choice.kept,
        )
        return cls(
            choice=choice,
            sequence=sequence,
            sampler=Sampler(
                model,
                choice.sampling,
                choice.prompt,
                choice=choice.index,
                token_limit=choice.token_limit,
                constraint=choice.constraint,
            ),
            assembler=TextAssembler(choice.sampling.stop),
        )

    def take(self, token: int, model: LlamaModel, logprob: TokenLogprob | None) -> Delta | None:
        """Account for a sampled token; returns what can be sent, or None if nothing can yet."""
        self.generated += 1
        self._unsent_tokens += 1
        ends = token in model.end_tokens and not self.choice.sampling.ignore_eos
        if ends or token in self.choice.sampling.stop_token_ids:
            return self._last_delta(FinishReason.STOP)
        start = self.assembler.received
        shown = token in self.choice.sampling.shown_tokens
        text = self.assembler.push(model.name(token) if shown else model.piece(token))
        if logprob is not None:
            self._logprobs.append((start, logprob))
        if self.assembler.stopped:
            return self._delta(text, FinishReason.STOP)
        constraint = self.choice.constraint
        if constraint is not None and constraint.complete:
            return self._last_delta(FinishReason.STOP, text)
        if len(self.choice.prompt) + self.generated >= self.choice.token_limit:
            return self._last_delta(FinishReason.LENGTH, text)
        return self._delta(text, None) if text else None

    def _last_delta(self, reason: FinishReason, text: str = "") -> Delta:
        text += self.assembler.finish()
        return self._delta(text, FinishReason.STOP if self.assembler.stopped else reason)

    def _delta(self, text: str, reason: FinishReason | None) -> Delta:
        logprobs = []
        end = reason is not None and not self.assembler.stopped
        while self._logprobs and (end or self._logprobs[0][0] < self.assembler.released):
            logprobs.append(self._logprobs.popleft()[1])
        count, self._unsent_tokens = self._unsent_tokens, 0
        return Delta(self.choice.index, text, count, tuple(logprobs), reason)


def joined(deltas: Row[Delta]) -> Delta | None:
    """Return what a choice gained in one step as one delta, or None if that was nothing."""
    if len(deltas) < 2:
        return deltas[0] if deltas else None
    return Delta(
        index=deltas[0].index,
        text="".join(each.text for each in deltas),
        token_count=sum(each.token_count for each in deltas),
        logprobs=tuple(logprob for each in deltas for logprob in each.logprobs),
        finish_reason=deltas[-1].finish_reason,
    )
