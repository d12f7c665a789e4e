"""The few statistics that the figures need (pure)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """Several measurements of one quantity: their median, the least, the greatest, and how many there were."""

    median: float
    least: float
    greatest: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return the median and range of one or more values.

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("there is nothing to take the median of")
    return Spread(float(median(values)), float(min(values)), float(max(values)), len(values))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the least value that at least `share` of all values do not exceed (the nearest-rank definition).

    Args:
        values: One or more.
        share: From 0 to 1; 0 gives the least value, 1 the greatest.

    Raises:
        ValueError: There are no values, or the share is out of range.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"no {share:g} quantile of {len(values)} values")
    rank = max(1, math.ceil(share * len(values)))
    return sorted(values)[rank - 1]


def steady_rate(streams: Sequence[Sequence[float]], tokens_per_stream: int) -> float:
    """Return the tokens a second of all streams together while all of them were decoding.

    That is from the first reading after the stream that began last has begun, to the last reading before the first
    stream ended, so prompt reading and the end, when fewer streams are left, do not count. Several tokens may be read
    at once. Within these limits each stream's rate is the tokens that came after its first reading, divided by the time
    between its first and last one; the sum of the rates is returned, so that it does not matter whose token came first
    at a limit. An event counts as the stream's tokens divided by its events, which is 1 unless a character spans
    several tokens.

    Streams so short that they hardly overlap have no such time; then everything after each stream's first reading
    counts, in the time from the first reading of all to the last, which is too little rather than too much.

    Args:
        streams: For each stream, the times in seconds at which its events with text were read, ascending.
        tokens_per_stream: How many tokens each stream has.

    Raises:
        ValueError: There is no time between any two readings.
    """
    begin = max(times[0] for times in streams)
    end = min(times[-1] for times in streams)
    steady = [[at for at in times if begin <= at < end] for times in streams]
    if all(times and times[-1] > times[0] for times in steady):
        limits = [(times[0], times[-1]) for times in steady]
        return sum(
            _tokens_after(times, first, tokens_per_stream, until=last) / (last - first)
            for times, (first, last) in zip(streams, limits, strict=True)
        )
    seconds = max(times[-1] for times in streams) - min(times[0] for times in streams)
    if seconds <= 0:
        raise ValueError("there is no time between the readings")
    return sum(_tokens_after(times, times[0], tokens_per_stream, until=times[-1]) for times in streams) / seconds


def _tokens_after(times: Sequence[float], first: float, tokens: int, *, until: float) -> float:
    return sum(first < at <= until for at in times) * tokens / len(times)


def longest_gap(times: Sequence[float], begin: float, end: float) -> float:
    """Return the longest silence of a stream between `begin` and `end`.

    The silence that `begin` falls into counts from the last arrival before it, the one that `end` falls into counts
    up to `end`. Without any arrival the whole time is one silence.

    Args:
        times: When something arrived, in seconds, ascending.
        begin: Where to start looking.
        end: Where to stop, not before `begin`.
    """
    before = [at for at in times if at <= begin]
    within = [at for at in times if begin < at < end]
    marks = [before[-1] if before else begin, *within, end]
    return max(later - earlier for earlier, later in pairwise(marks))
