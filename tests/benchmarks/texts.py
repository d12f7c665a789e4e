"""Prose of a wanted length: the same each time for the same seed, and no sentence twice in a text (pure)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

CountTokens = Callable[[str], int]

_TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "rivers": (
        ("ferryman", "miller", "surveyor", "angler", "lock keeper", "boat builder"),
        ("current", "weir", "reed bed", "old ferry", "flood mark", "gravel bank", "sluice"),
        ("the upper bend", "the stone bridge", "the delta", "the landing stage", "the water meadow"),
    ),
    "bread": (
        ("baker", "apprentice", "grocer", "flour merchant", "neighbour", "inspector"),
        ("sourdough", "oven", "rye loaf", "kneading trough", "flour sack", "crust", "yeast"),
        ("the bakery", "the village square", "the storeroom", "the market hall", "the back kitchen"),
    ),
    "railways": (
        ("signalman", "stoker", "conductor", "track walker", "station master", "engineer"),
        ("night train", "signal box", "timetable", "coal tender", "branch line", "turntable", "whistle"),
        ("the junction", "platform four", "the viaduct", "the engine shed", "the border station"),
    ),
    "astronomy": (
        ("observer", "lens grinder", "professor", "night assistant", "amateur", "librarian"),
        ("telescope", "comet", "star chart", "eclipse", "double star", "dome", "spectrograph"),
        ("the observatory", "the southern ridge", "the reading room", "the roof terrace", "the desert camp"),
    ),
    "glass": (
        ("glass blower", "furnace tender", "trader", "cutter", "young designer", "customs officer"),
        ("furnace", "goblet", "blowpipe", "window pane", "cooling chamber", "mould", "coloured rod"),
        ("the workshop", "the island", "the harbour office", "the cathedral", "the exhibition"),
    ),
    "bees": (
        ("beekeeper", "botanist", "farmer", "orchard owner", "schoolteacher", "vet"),
        ("hive", "swarm", "honeycomb", "queen", "smoker", "lime tree", "wax"),
        ("the orchard", "the heath", "the south wall", "the cellar", "the experimental garden"),
    ),
    "harbours": (
        ("pilot", "dock worker", "sailor", "crane driver", "chandler", "harbour master"),
        ("crane", "lighthouse", "breakwater", "cargo manifest", "tug", "anchor chain", "fog horn"),
        ("the outer mole", "the dry dock", "the fish market", "the customs house", "the container yard"),
    ),
    "paper": (
        ("printer", "bookbinder", "archivist", "rag collector", "forger", "typesetter"),
        ("printing press", "watermark", "ledger", "paper mill", "ink", "vellum", "proof sheet"),
        ("the archive", "the mill stream", "the print shop", "the attic", "the court of appeal"),
    ),
    "mountains": (
        ("guide", "shepherd", "climber", "geologist", "hut warden", "surveyor's widow"),
        ("glacier", "rope", "avalanche fence", "mule path", "summit cross", "ice axe", "weather station"),
        ("the north face", "the pass", "the last hut", "the valley school", "the moraine"),
    ),
    "theatre": (
        ("prompter", "stage hand", "actress", "critic", "costume maker", "director"),
        ("curtain", "trapdoor", "script", "spotlight", "wig", "painted forest", "orchestra pit"),
        ("the rehearsal room", "the gallery", "the stage door", "the workshop upstairs", "the provincial tour"),
    ),
    "salt": (
        ("salt miner", "cook", "tax collector", "chemist", "caravan leader", "fisherman's daughter"),
        ("brine", "salt pan", "wooden wheel", "shaft", "white crystal", "barrel", "price list"),
        ("the mine", "the coast road", "the evaporation ponds", "the treasury", "the kitchen yard"),
    ),
    "maps": (
        ("cartographer", "explorer", "smuggler", "engraver", "governor", "land agent"),
        ("compass", "coastline", "copper plate", "boundary stone", "scale bar", "blank region", "triangulation"),
        ("the map room", "the frontier", "the admiralty", "the high plateau", "the survey camp"),
    ),
}
"""For each topic: people, things and places."""

_ADJECTIVES = (
    "patient", "careless", "quiet", "famous", "narrow", "half-finished", "costly", "plain", "crooked",
    "reliable", "forgotten", "brand-new", "heavy", "delicate", "suspicious", "generous", "weathered", "bright",
)  # fmt: skip
_VERBS = (
    "repaired", "described", "ignored", "measured", "borrowed", "painted", "examined", "sold", "abandoned",
    "defended", "photographed", "inherited", "moved", "cleaned", "doubted", "replaced",
)  # fmt: skip
_TIMES = (
    "before sunrise", "in the spring of that year", "after the second bell", "on a windy Thursday", "every winter",
    "within an hour", "long after the others had left", "during the strike", "at the end of the season",
    "while it was still raining", "on the eve of the feast", "twice a week",
)  # fmt: skip
_REASONS = (
    "because nobody had asked for permission", "although the accounts said otherwise", "since the price had doubled",
    "so that the visitors would notice", "even if it cost a whole afternoon", "as the old contract demanded",
    "which surprised the whole council", "but told only two people about it", "and kept a record of every step",
    "unless the weather turned", "for reasons that were never written down", "as if it were the easiest thing",
)  # fmt: skip
_FRAMES = (
    "{Time}, the {adjective} {person} {verb} the {thing} near {place}, {reason}.",
    "The {person} {verb} a {adjective} {thing} {time}, {reason}.",
    "At {place} stood a {adjective} {thing} that the {person} had {verb} {time}.",
    "Nobody at {place} believed the {person} who {verb} the {adjective} {thing} {time}.",
    "When the {person} came to {place}, the {thing} was {adjective}, and the {other} {verb} it {time}.",
    "It took the {adjective} {person} {number} days to reach {place} with the {thing}, {reason}.",
    "Of the {number} people at {place}, only the {person} knew how the {thing} had been {verb}, {reason}.",
    "The letter about the {thing} reached {place} {time}, and the {adjective} {other} {verb} the {person}'s copy.",
    "“No {thing} is ever {adjective},” said the {person}, who had {verb} {number} of them at {place} {time}.",
    "Where {place} begins, the {other} {verb} the first {thing}, {reason}.",
    "For {number} years the {thing} had been {adjective}; then the {person} {verb} it {time}.",
    "Between {place} and the {thing} lay {number} steps, which the {adjective} {person} {verb} {time}, {reason}.",
)


def prose(seed: str) -> Iterator[str]:
    """Yield sentences about one topic after another, and all topics again and again; no sentence comes twice."""
    chance = random.Random(seed)
    seen: set[str] = set()
    topics: list[str] = []
    while True:
        topics = topics or chance.sample(sorted(_TOPICS), len(_TOPICS))
        people, things, places = _TOPICS[topics.pop()]
        for _ in range(chance.randint(3, 7)):
            person, other = chance.sample(people, 2)
            time = chance.choice(_TIMES)
            sentence = chance.choice(_FRAMES).format(
                person=person,
                other=other,
                thing=chance.choice(things),
                place=chance.choice(places),
                adjective=chance.choice(_ADJECTIVES),
                verb=chance.choice(_VERBS),
                time=time,
                Time=time.capitalize(),
                reason=chance.choice(_REASONS),
                number=chance.randint(2, 99),
            )
            if sentence not in seen:
                seen.add(sentence)
                yield sentence


def text(seed: str, tokens: int, count: CountTokens) -> str:
    """Return prose of `tokens` tokens, or as few less as whole words allow.

    Args:
        seed: Another one gives another text, different from its first sentences on.
        tokens: At least as many as the longest word has.
        count: Returns the tokens of a text.
    """
    sentences: list[str] = []
    total = 0
    for sentence in prose(seed):
        sentences.append(sentence)
        total += count(f" {sentence}")
        if total > tokens and count(" ".join(sentences)) >= tokens:
            break
    words = " ".join(sentences).split(" ")
    while count(" ".join(words)) > tokens:
        words.pop()
    return " ".join(words)


def quoted_share(answer: str, source: str, words: int = 4) -> float:
    """Return which share of an answer's runs of so many words are found in a source, from 0 to 1."""
    runs = _runs(answer, words)
    found = set(_runs(source, words))
    return sum(run in found for run in runs) / len(runs) if runs else 0.0


def _runs(passage: str, words: int) -> list[tuple[str, ...]]:
    parts = passage.split()
    return [tuple(parts[at : at + words]) for at in range(len(parts) - words + 1)]
