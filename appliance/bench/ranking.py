"""How good a ranking is, by the measures of information retrieval (pure).

A judgement says how relevant a document is to a query: 0 not at all, the more the better. Documents without one count
as not relevant, as in trec_eval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Judgements = Mapping[str, int]
"""Relevance of documents to one query."""


def ndcg(ranking: Sequence[str], judgements: Judgements, depth: int = 10) -> float:
    """Return the normalised discounted cumulative gain of the first `depth` documents, 0 to 1.

    The gain is the judgement itself and the discount log2(1 + rank), as in trec_eval and BEIR (Järvelin and Kekäläinen,
    2002). A document that is ranked twice counts once.

    Raises:
        ValueError: No document is relevant.
    """
    ideal = _gain(sorted(_relevant(judgements).values(), reverse=True)[:depth])
    return _gain([max(0, judgements.get(each, 0)) for each in _distinct(ranking)[:depth]]) / ideal


def recall(ranking: Sequence[str], judgements: Judgements, depth: int) -> float:
    """Return the share of the relevant documents that are among the first `depth`.

    Raises:
        ValueError: No document is relevant.
    """
    relevant = _relevant(judgements)
    return len(relevant.keys() & set(_distinct(ranking)[:depth])) / len(relevant)


def reciprocal_rank(ranking: Sequence[str], judgements: Judgements, depth: int = 10) -> float:
    """Return 1 / the rank of the first relevant document, or 0 if none is among the first `depth`; its mean is MRR.

    Raises:
        ValueError: No document is relevant.
    """
    relevant = _relevant(judgements)
    ranks = (rank for rank, each in enumerate(_distinct(ranking)[:depth], 1) if each in relevant)
    return 1.0 / next(ranks, math.inf)


def _relevant(judgements: Judgements) -> dict[str, int]:
    relevant = {each: grade for each, grade in judgements.items() if grade > 0}
    if not relevant:
        raise ValueError("a query without a relevant document has no measure")
    return relevant


def _distinct(ranking: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(ranking))


def _gain(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(1 + rank) for rank, grade in enumerate(grades, 1))
