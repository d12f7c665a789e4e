"""What the legs of a search found becomes one ranking (pure).

    keyword leg ──► best rank over all phrasings ──┐
                                                   ├─► reciprocal rank fusion ─► 1 is "first in every leg that counts"
    semantic leg ─► best rank over all phrasings ──┘        ▲
                                                            └── weight of the semantic leg: `semantic_weight`

Reciprocal rank fusion: Cormack, Clarke and Büttcher, SIGIR 2009. Scores of the legs are never added up, as BM25 and
cosine have no common scale; but they tell how far to trust a leg. A keyword leg whose best passage has many of the
question's terms, and a score far above that of its tenth, is hardly ever wrong. Then a semantic leg that disagrees
counts little, and so an embedder that does not know the language of the question does not spoil what words found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

RRF_K = 10
"""Added to every rank: the higher, the less the first ranks stand out."""

CANDIDATES = 100
"""Hits that are asked of each leg."""

MOST_JOINED = 3
"""Chunks of one file that become one passage."""

JOINED_AMONG = 20
"""Only the best so many hits are joined: what is far down is no reason to lengthen what is at the top."""

LEAST_COVERAGE = 0.2
"""A keyword leg alone whose best passages have less of the question's terms found nothing. It costs
CMRC2018 less than 1 %."""

SURE_COVERAGE = 0.67
"""One whose best passages have so much found something, though the semantic leg looked and found nothing."""

LEAST_BEST_COSINE = 0.3
"""A semantic leg whose best passage is less near found nothing. With all-MiniLM-L6-v2 the best passage of SciFact is
nearer than 0.34 for each of its claims; embedders whose cosines are all higher find something always."""

LEAST_COSINE = 0.15
"""A passage that is less near is left out."""

SURE_LEAD = 1.5
"""A keyword leg that leads by more is believed more than a semantic leg that disagrees. Measured on SciFact and
CMRC2018 alike: of those that lead by less than 1.5 a third has the right passage first, of those by 4 nine in ten."""

_DISBELIEF = 4
"""How quickly the weight of the semantic leg falls with the lead."""

_PLACE = 10
"""The hit whose BM25 score the best one is compared with."""

_LEAST_SCORE = 1e-9

Answer = Sequence[tuple[int, float]]
"""Chunk ids and scores of one phrasing in one leg, best first."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a leg found a chunk: its best rank over all phrasings, from 1, and the score there."""

    rank: int
    score: float


Leg = Mapping[int, Place]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A chunk that was found; `score` is 1 for one that is first in every leg that took part."""

    chunk: int
    score: float
    keyword: Place | None
    semantic: Place | None


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk as it is in the truth.

    Attributes:
        file: The file's key.
        position: Its number among the file's chunks.
        start: Where it begins in the text taken from the file, in characters; `end` is behind its last.
    """

    chunk: int
    file: int
    position: int
    text: str
    start: int
    end: int
    page: int | None
    heading: tuple[str, ...]
    tokens: int
    text_hash: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """A passage and how it was found; of several that were joined, how the best of them was.

    Attributes:
        score: 0 to 1, never more than that of a better hit: the fused one, or the reranker's.
    """

    passage: Passage
    candidate: Candidate
    score: float
    rerank_score: float | None = None


@dataclass(frozen=True, slots=True, order=True)
class Confidence:
    """How sure the keyword leg may be of what it found.

    Attributes:
        coverage: The largest share of the question's terms that one of its best passages has, 0 to 1.
        lead: How often the score of its tenth hit, or of its last, goes into that of its first.
    """

    coverage: float
    lead: float


def places(answers: Iterable[Answer], least: float = -1.0) -> dict[int, Place]:
    """Return each chunk's best place over all phrasings; what scores less than `least` is left out."""
    found: dict[int, Place] = {}
    for answer in answers:
        for rank, (chunk, score) in enumerate(answer, 1):
            if score < least:
                break
            known = found.get(chunk)
            if known is None or (rank, -score) < (known.rank, -known.score):
                found[chunk] = Place(rank, score)
    return found


def confidence(answer: Answer, terms: Sequence[str], best: Iterable[Sequence[str]]) -> Confidence:
    """Return how sure a keyword leg is of its answer to one phrasing.

    Args:
        answer: What it found.
        terms: The question's.
        best: The terms of the best passages, each.
    """
    wanted = set(terms)
    share = max((len(wanted.intersection(each)) / len(wanted) for each in best), default=0.0) if wanted else 0.0
    return Confidence(share, _lead(answer))


def _lead(answer: Answer) -> float:
    if not answer:
        return 1.0
    return answer[0][1] / max(answer[:_PLACE][-1][1], _LEAST_SCORE)


def fuse(keyword: Leg, semantic: Leg, *, weight: float = 1.0, k: int = RRF_K) -> list[Candidate]:
    """Return what the legs found, best first; an empty leg took no part.

    Args:
        keyword: The keyword leg.
        semantic: The semantic leg.
        weight: Of the semantic leg, relative to the keyword leg's 1.
        k: Added to every rank.
    """
    best = ((1.0 if keyword else 0.0) + (weight if semantic else 0.0)) / (k + 1)
    candidates = []
    for chunk in keyword.keys() | semantic.keys():
        word, meaning = keyword.get(chunk), semantic.get(chunk)
        total = (1.0 / (k + word.rank) if word else 0.0) + (weight / (k + meaning.rank) if meaning else 0.0)
        candidates.append(Candidate(chunk, total / best, word, meaning))
    return sorted(candidates, key=lambda each: (-each.score, each.chunk))


def relevant(keyword: Leg, semantic: Leg, sure: Confidence, *, complete: bool) -> tuple[Leg, Leg]:
    """Return what of each leg is relevant; nothing at all is an answer.

    Args:
        keyword: The keyword leg.
        semantic: The semantic leg.
        sure: The keyword leg's confidence.
        complete: The semantic leg saw every passage, so that what it did not find tells something too.
    """
    nearest = max((each.score for each in semantic.values()), default=-1.0)
    if nearest < LEAST_BEST_COSINE:
        least = SURE_COVERAGE if complete else LEAST_COVERAGE
        return (keyword if sure.coverage >= least else {}), {}
    return keyword, semantic


def semantic_weight(sure: Confidence) -> float:
    """Return the weight of the semantic leg beside a keyword leg with this confidence, 0 to 1."""
    return min(1.0, (SURE_LEAD / sure.lead) ** _DISBELIEF)


def reordered(found: Sequence[Found], scores: Sequence[float]) -> list[Found]:
    """Return the best passages in the order of a reranker's scores, and the others behind them."""
    read = [
        replace(each, score=min(1.0, max(0.0, score)), rerank_score=score)
        for each, score in zip(found, scores, strict=False)
    ]
    read.sort(key=lambda each: -each.score)
    least = read[-1].score if read else 1.0
    return read + [replace(each, score=min(least, each.score)) for each in found[len(read) :]]


def without_duplicates(found: Iterable[Found]) -> list[Found]:
    """Leave out passages whose text is that of a better one."""
    seen: dict[bytes, Found] = {}
    for each in found:
        seen.setdefault(each.passage.text_hash, each)
    return list(seen.values())


def within_budget(found: Sequence[Found], most_tokens: int | None) -> list[Found]:
    """Leave out passages that do not fit into the tokens that better ones leave."""
    if most_tokens is None:
        return list(found)
    fitting, room = [], most_tokens
    for each in found:
        if each.passage.tokens <= room:
            fitting.append(each)
            room -= each.passage.tokens
    return fitting


def joined(found: Sequence[Found]) -> list[Found]:
    """Join neighbours of one file among the best passages; each group stands where its best one stood."""
    result: list[Found] = []
    taken: set[int] = set()
    at = {(each.passage.file, each.passage.position): each for each in reversed(found[:JOINED_AMONG])}
    for each in found[:JOINED_AMONG]:
        if each.passage.chunk in taken:
            continue
        group = _group(each, at, taken)
        taken.update(member.chunk for member in group)
        result.append(replace(each, passage=_joined(group)))
    return result + list(found[JOINED_AMONG:])


def _group(best: Found, at: Mapping[tuple[int, int], Found], taken: set[int]) -> list[Passage]:
    """Return the passage and its neighbours that were found too and belong to nobody yet, in the file's order."""
    group = [best.passage]
    for step, end in ((1, -1), (-1, 0)):
        while len(group) < MOST_JOINED:
            edge = group[end]
            other = at.get((edge.file, edge.position + step))
            if other is None or other.passage.chunk in taken:
                break
            pair = (edge, other.passage) if step == 1 else (other.passage, edge)
            if _seam(*pair) is None:
                break
            group.insert(len(group) if step == 1 else 0, other.passage)
    return group


def _seam(first: Passage, second: Passage) -> str | None:
    """Return what the second passage adds to the first, or None if their texts cannot be put together.

    They overlap, or are apart by what separates blocks; a passage whose text is not that of its span (a table whose
    head is repeated) cannot be cut.
    """
    shared = first.end - second.start
    if shared <= 0:
        return ("\n\n" if shared else "") + second.text
    if shared < len(second.text) and first.text.endswith(second.text[:shared]):
        return second.text[shared:]
    return None


def _joined(group: Sequence[Passage]) -> Passage:
    whole = group[0]
    for each in group[1:]:
        whole = replace(
            whole, text=whole.text + (_seam(whole, each) or ""), end=each.end, tokens=whole.tokens + each.tokens
        )
    return whole
