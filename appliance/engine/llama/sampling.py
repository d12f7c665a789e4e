"""A row of logits becomes a token, by llama.cpp's own samplers.

Order, as in OpenAI's and Hugging Face's definition of the parameters: bias, penalties, temperature, then the cuts
(top_k, typical, top_p, min_p), then the draw. top_k is applied before the temperature, which changes nothing but speed.
Frequency and presence penalties look at the generated text only; the repeat penalty looks at the prompt's end too.

Within a grammar a token is first drawn freely, and kept if the grammar allows it. If not, it is drawn again among those
that the cuts have left and the grammar allows. Together that is exactly one draw from what the cuts have left,
restricted to the grammar and normalised: p(x) + (1 - p(allowed)) p(x) / p(allowed) = p(x) / p(allowed). Only where the
cuts leave nothing that is allowed are they made anew, of what is. (llama.cpp makes them anew in either case, which
mixes two distributions.)
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.core.errors import EngineError
from appliance.core.types import SamplingParams, TokenLogprob
from appliance.engine.llama.constraint import Constraint
from appliance.engine.llama.context import LlamaContext, Logits
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama, short

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data`."""
Candidates = npt.NDArray[np.void]

_BAN = -1e9
"""A logit bias that no probability survives, finite so that sums stay finite."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The logits of a batch, shape (rows, vocabulary); of each row the likeliest token, and whether all is finite."""

    logits: Logits
    likeliest: npt.NDArray[np.intp]
    finite: npt.NDArray[np.bool_]


class Sampler:
    """Draws one choice's tokens.

    Greedy choices without penalties need no native sampler: to copy a whole vocabulary for it takes twenty times as
    long as to look for the largest logit.
    """

    def __init__(
        self,
        model: LlamaModel,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        choice: int,
        token_limit: int,
        constraint: Constraint | None = None,
    ) -> None:
        """Prepare for a prompt.

        Args:
            model: Whose tokens are drawn.
            params: How they are drawn.
            prompt: What the repeat penalty looks back on.
            choice: Sets apart the draws of one request that share a seed.
            token_limit: Most tokens of prompt and answer; llama.cpp reserves memory for as many as a penalty looks
                back on, so a caller's larger figure is cut to it.
            constraint: What every token is drawn within, and moved along with; or None.
        """
        self._constraint = constraint
        self._model = model
        self._token_limit = token_limit
        self._params = params
        bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < model.vocabulary_size}
        if params.ignore_eos:
            bias |= dict.fromkeys(model.end_tokens, _BAN)
        self._biased = np.fromiter(bias.keys(), np.intp, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        self._chain: Any = None
        if params.temperature > 0 or _has_penalties(params):
            self._chain = self._build(bias, prompt, choice)

    def sample(self, context: LlamaContext, row: int, rows: Rows) -> int:
        """Return the next token from one row of the last batch.

        Raises:
            EngineError: The row is not of numbers.
            InvalidRequestError: The choice's grammar cannot be followed any further.
        """
        if not rows.finite[row]:
            raise not_a_number()
        if self._constraint is not None:
            return self._sample_within(self._constraint, rows, row)
        if self._chain is None:
            return self._greedy(rows, row)
        return int(short.llama_sampler_sample(self._chain, context.handle, context.outputs[row]))

    def _sample_within(self, constraint: Constraint, rows: Rows, row: int) -> int:
        """Return the next token of those that the constraint allows; the vocabulary is masked only upon a refusal."""
        scores = rows.logits[row]
        if self._chain is not None:
            return self._draw_within(constraint, scores)
        token = self._greedy(rows, row)
        if not constraint.take(token):
            token = self._likeliest(np.where(constraint.allowed(), scores, np.float32(-np.inf)))
            constraint.take(token)
        return token

    def _draw_within(self, constraint: Constraint, scores: Logits) -> int:
        token, left = _apply(self._chain, _candidates(scores))
        if not constraint.take(token):
            allowed = constraint.allowed()
            left = left[np.flatnonzero(allowed[left["id"]])]
            if len(left):
                last = short.llama_sampler_chain_get(self._chain, short.llama_sampler_chain_n(self._chain) - 1)
                token, _ = _apply(last, left)
            else:
                token, _ = _apply(self._chain, _candidates(scores)[np.flatnonzero(allowed)])
            constraint.take(token)
        short.llama_sampler_accept(self._chain, token)
        return token

    def _greedy(self, rows: Rows, row: int) -> int:
        return self._likeliest(rows.logits[row]) if len(self._biased) else int(rows.likeliest[row])

    def _likeliest(self, scores: Logits) -> int:
        """Return the greedy choice; the bias is put in and taken out again, since log probabilities are without it."""
        before = scores[self._biased]
        scores[self._biased] += self._bias
        token = int(scores.argmax())
        scores[self._biased] = before
        return token

    def close(self) -> None:
        """Free the native sampler. Idempotent."""
        if self._chain is not None:
            short.llama_sampler_free(self._chain)
            self._chain = None

    def _build(self, bias: dict[int, float], prompt: Sequence[int], choice: int) -> Any:
        chain = short.llama_sampler_chain_init(short.llama_sampler_chain_default_params())
        for stage in self._stages(bias, prompt, choice):
            short.llama_sampler_chain_add(chain, stage)
        return chain

    def _stages(self, bias: dict[int, float], prompt: Sequence[int], choice: int) -> Iterable[Any]:
        params, size = self._params, self._model.vocabulary_size
        if bias:
            entries = (llama.llama_logit_bias * len(bias))(*bias.items())
            yield short.llama_sampler_init_logit_bias(size, len(bias), entries)
        if params.frequency_penalty or params.presence_penalty:
            yield short.llama_sampler_init_penalties(
                size, self._token_limit, 1.0, params.frequency_penalty, params.presence_penalty
            )
        if params.repeat_penalty != 1.0 and params.repeat_last_n:
            window = min(params.repeat_last_n, self._token_limit)
            repeat = short.llama_sampler_init_penalties(size, window, params.repeat_penalty, 0.0, 0.0)
            for token in prompt[-window:]:
                short.llama_sampler_accept(repeat, token)
            yield repeat
        if params.temperature == 0:
            yield short.llama_sampler_init_greedy()
            return
        if params.top_k:
            yield short.llama_sampler_init_top_k(params.top_k)
        yield short.llama_sampler_init_temp(params.temperature)
        if params.typical_p < 1:
            yield short.llama_sampler_init_typical(params.typical_p, 1)
        if params.top_p < 1:
            yield short.llama_sampler_init_top_p(params.top_p, 1)
        if params.min_p > 0:
            yield short.llama_sampler_init_min_p(params.min_p, 1)
        seed = secrets.randbits(32) if params.seed is None else params.seed + choice
        yield short.llama_sampler_init_dist(seed & 0xFFFFFFFF)


def not_a_number() -> EngineError:
    """Return the error of a choice whose logits are not numbers, which damaged weights bring about."""
    return EngineError("The model's answer is not a number.", code="not_a_number")


@cache
def _every_token(vocabulary_size: int) -> Candidates:
    every = np.zeros(vocabulary_size, _CANDIDATE)
    every["id"] = np.arange(vocabulary_size, dtype=np.int32)
    return every


def _candidates(scores: Logits) -> Candidates:
    candidates = _every_token(len(scores)).copy()
    candidates["logit"] = scores
    return candidates


def _apply(sampler: Any, candidates: Candidates) -> tuple[int, Candidates]:
    """Return the candidate that a native sampler selects, and those that its cuts have left."""
    data = llama.llama_token_data_array(
        data=candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data)),
        size=len(candidates),
        selected=-1,
        sorted=False,
    )
    short.llama_sampler_apply(sampler, ctypes.byref(data))
    return int(candidates[data.selected]["id"]), candidates[: data.size]


def token_logprob(model: LlamaModel, logits: Logits, row: int, token: int, top: int) -> TokenLogprob:
    """Return a token's natural log probability by the model alone, with the `top` likeliest alternatives."""
    scores = logits[row].astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    likeliest: Sequence[int] = ()
    if top:
        candidates = np.argpartition(scores, -top)[-top:]
        likeliest = candidates[np.argsort(scores[candidates])[::-1]].tolist()
    return TokenLogprob(
        token_id=token,
        piece=model.piece(token),
        logprob=float(scores[token]),
        top=tuple((each, model.piece(each), float(scores[each])) for each in likeliest),
    )


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.frequency_penalty or params.presence_penalty or (params.repeat_penalty != 1.0 and params.repeat_last_n)
    )
