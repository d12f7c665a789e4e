"""What an engine does, as metrics. Runs on the event loop."""

from __future__ import annotations

from appliance.engine.llama.generation import Admitted, Event, Gained, LlamaGeneration
from appliance.observe.metrics import ModelMetrics

WEIGHT = 0.1
"""Share of the newest request in the mean duration."""


class EngineMeter:
    """Turns the worker's events into counters and histograms.

    Attributes:
        mean_request_s: Exponentially weighted mean of the requests' durations after admission, for Retry-After.
    """

    def __init__(self, metrics: ModelMetrics) -> None:
        """Measure into the given metrics, but requests with metrics of their own into those."""
        self._metrics = metrics
        self._metrics_of: dict[LlamaGeneration, ModelMetrics] = {}
        self._reason: dict[LlamaGeneration, str] = {}
        self.mean_request_s = 1.0

    def accepted(self, generation: LlamaGeneration, metrics: ModelMetrics | None = None) -> None:
        """Count a request that was queued, here and later in `metrics` if it has such of its own."""
        if metrics is not None:
            self._metrics_of[generation] = metrics
        self._of(generation).prompt_tokens(generation.usage.prompt_tokens)

    def event(self, generation: LlamaGeneration, event: Event) -> None:
        """Count an event that the generation is about to receive."""
        if generation.ended:
            return
        metrics = self._of(generation)
        match event:
            case Gained(delta, at):
                last_gain = generation.gained_at.get(delta.index)
                if last_gain is not None:
                    metrics.inter_token_latency((at - last_gain) / max(1, delta.token_count))
                elif generation.first_token_at is None:
                    metrics.time_to_first_token(at - generation.submitted_at)
                metrics.generation_tokens(delta.token_count)
                if delta.finish_reason is not None:
                    self._reason[generation] = str(delta.finish_reason)
            case Admitted(cached):
                if generation.admitted_at is None:
                    metrics.prefix_cache(generation.usage.prompt_tokens, cached)

    def request_ended(self, generation: LlamaGeneration) -> None:
        """Count a request that came to its end; failed and cancelled ones only leave the books."""
        metrics = self._of(generation)
        self._metrics_of.pop(generation, None)
        reason = self._reason.pop(generation, None)
        if reason is None or generation.open_choices:
            return
        timings = generation.timings
        worked = timings.prefill_s + timings.decode_s
        self.mean_request_s += WEIGHT * (worked - self.mean_request_s)
        metrics.request_finished(reason, timings.queue_s, timings.prefill_s, timings.queue_s + worked)

    def _of(self, generation: LlamaGeneration) -> ModelMetrics:
        return self._metrics_of.get(generation, self._metrics)

    def speculation(self, draft_tokens: int, accepted_tokens: int) -> None:
        """Count the guessed tokens of a step, if it had any."""
        if draft_tokens:
            self._metrics.speculation(draft_tokens, accepted_tokens)

    def load(self, *, running: int, waiting: int) -> None:
        """Show how many requests run and wait."""
        self._metrics.set_running(running)
        self._metrics.set_waiting(waiting)

    def cells(self, ratio: float) -> None:
        """Show the share of KV cells in use."""
        self._metrics.set_kv_cache_usage(ratio)
