"""The keyword index on public questions with known answers: needs their folder in APPLIANCE_EVAL_DATA."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import pytest

from appliance.retrieval.lexical import KeywordIndex

DATA = Path(os.environ.get("APPLIANCE_EVAL_DATA", "/nonexistent"))
Question = tuple[str, dict[int, int]]
"""Its text, and the relevance of the passages that answer it."""

pytestmark = pytest.mark.slow


def scifact() -> tuple[dict[int, str], list[Question]]:
    with gzip.open(DATA / "scifact" / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    relevant: dict[str, dict[int, int]] = defaultdict(dict)
    for line in (DATA / "scifact" / "qrels.test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, passage, score = line.split("\t")
        relevant[query][int(passage)] = int(score)
    queries = map(json.loads, (DATA / "scifact" / "queries.jsonl").read_text(encoding="utf-8").splitlines())
    texts = {int(row["_id"]): f"{row['title']}\n\n{row['text']}" for row in rows}
    return texts, [(each["text"], relevant[each["_id"]]) for each in queries if each["_id"] in relevant]


def cmrc2018() -> tuple[dict[int, str], list[Question]]:
    texts: dict[int, str] = {}
    questions: list[Question] = []
    for article in json.loads((DATA / "cmrc2018" / "cmrc2018_dev.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            number = len(texts) + 1
            texts[number] = paragraph["context"]
            questions += [(each["question"], {number: 1}) for each in paragraph["qas"]]
    return texts, questions


def ndcg_at_10(found: list[int], relevant: dict[int, int]) -> float:
    gain = sum(relevant.get(each, 0) / math.log2(rank + 2) for rank, each in enumerate(found[:10]))
    best = sorted(relevant.values(), reverse=True)[:10]
    return gain / sum(each / math.log2(rank + 2) for rank, each in enumerate(best))


@pytest.mark.parametrize(("name", "least"), [("scifact", 0.69), ("cmrc2018", 0.975)])
def test_the_keyword_leg_alone_reaches_its_quality(name: str, least: float, tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"APPLIANCE_EVAL_DATA has no {name}")
    texts, questions = {"scifact": scifact, "cmrc2018": cmrc2018}[name]()
    with closing(KeywordIndex(tmp_path / "keywords")) as index:
        index.rebuild((1, number, text) for number, text in texts.items())
        scores = [
            ndcg_at_10([number for number, _ in index.search(1, question, 10)], relevant)
            for question, relevant in questions
        ]
    assert sum(scores) / len(scores) >= least
