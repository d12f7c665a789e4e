"""Measures of rankings by hand, test collections in their forms, and an evaluation over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.judged import JudgedCollection, load
from appliance.bench.ranking import ndcg, recall, reciprocal_rank
from appliance.bench.retrieval import Server, evaluate
from appliance.cli.eval import command
from appliance.core.errors import InvalidRequestError, UnavailableError

DEADLINE_S = 20.0

# Measures


def test_ndcg_is_the_gain_by_the_best_gain() -> None:
    judgements = {"a": 2, "b": 1, "c": 0}
    best = 2 + 1 / math.log2(3)
    assert ndcg(["a", "b"], judgements) == pytest.approx(1.0)
    assert ndcg(["b", "a"], judgements) == pytest.approx((1 + 2 / math.log2(3)) / best)
    assert ndcg(["c", "x", "b"], judgements) == pytest.approx((1 / math.log2(4)) / best)
    assert ndcg(["x"] * 10 + ["a"], judgements) == pytest.approx((2 / math.log2(3)) / best), "x counts once"
    assert ndcg([str(each) for each in range(10)] + ["a"], judgements) == 0.0
    assert ndcg([], judgements) == 0.0


def test_ndcg_of_more_relevant_documents_than_places_can_be_one() -> None:
    judgements = {str(each): 1 for each in range(20)}
    assert ndcg([str(each) for each in range(10)], judgements, 10) == pytest.approx(1.0)


def test_recall_is_the_share_of_what_is_relevant() -> None:
    judgements = {"a": 1, "b": 3, "c": 0, "d": 1}
    assert recall(["c", "b", "x", "a"], judgements, 3) == pytest.approx(1 / 3)
    assert recall(["c", "b", "x", "a", "d"], judgements, 100) == 1.0


def test_the_reciprocal_rank_is_that_of_the_first_relevant_document() -> None:
    assert reciprocal_rank(["c", "c", "b", "a"], {"a": 1, "b": 1, "c": 0}) == 0.5
    assert reciprocal_rank(["x"], {"a": 1}) == 0.0
    assert reciprocal_rank(["x", "a"], {"a": 1}, 1) == 0.0


@pytest.mark.parametrize("measure", [ndcg, reciprocal_rank, lambda ranking, judged: recall(ranking, judged, 10)])
def test_a_query_without_a_relevant_document_has_no_measure(measure: Any) -> None:
    with pytest.raises(ValueError, match="without a relevant document"):
        measure(["a"], {"a": 0})


@given(st.permutations("01234"), st.sets(st.sampled_from("01234"), min_size=1))
def test_measures_are_from_none_to_one_and_never_fall_when_something_relevant_rises(
    ranking: list[str], relevant: set[str]
) -> None:
    judgements = dict.fromkeys(relevant, 1)
    place = next(number for number, each in enumerate(ranking) if each in relevant)
    better = [ranking[place], *ranking[:place], *ranking[place + 1 :]]
    for measure in (ndcg, reciprocal_rank):
        assert 0 <= measure(ranking, judgements) <= measure(better, judgements) <= 1 + 1e-9
    assert recall(ranking, judgements, 5) == 1.0


# Collections


def write_beir(folder: Path, *, compressed: bool = False, nested: bool = True) -> None:
    corpus = [
        {"_id": "d1", "title": "Pumps", "text": "The pump leaks oil.", "metadata": {}},
        {"_id": "d2", "text": "A holiday."},
        {"_id": "d3", "title": "", "text": ""},
    ]
    queries = [{"_id": "q1", "text": "pump oil"}, {"_id": "q2", "text": "free time"}, {"_id": "q3", "text": "unjudged"}]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        data = "".join(f"{json.dumps(each)}\n" for each in rows).encode() + b"\n"
        suffix = ".jsonl.gz" if compressed else ".jsonl"
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if compressed else data)
    path = folder / "qrels" / "test.tsv" if nested else folder / "qrels.test.tsv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t1\nq2\tgone\t1\n", encoding="utf-8")


@pytest.mark.parametrize(("compressed", "nested"), [(False, True), (True, False)])
def test_a_folder_of_beir_is_read(tmp_path: Path, *, compressed: bool, nested: bool) -> None:
    write_beir(tmp_path, compressed=compressed, nested=nested)
    found = load(tmp_path)
    assert found.documents == {"d1": "Pumps\n\nThe pump leaks oil.", "d2": "A holiday.", "d3": ""}
    assert found.queries == {"q1": "pump oil", "q2": "free time"}
    assert found.judgements == {"q1": {"d1": 2}, "q2": {"d2": 1}}


def test_judgements_without_a_heading_lose_none(tmp_path: Path) -> None:
    write_beir(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("q1\t0\td1\t1\nq2\t0\td2\t1\n", encoding="utf-8")
    assert load(tmp_path).judgements == {"q1": {"d1": 1}, "q2": {"d2": 1}}


def test_paragraphs_and_questions_are_read(tmp_path: Path) -> None:
    def paragraph(context: str, *questions: str) -> dict[str, Any]:
        return {"id": "x", "context": context, "qas": [{"id": f"{each}?", "question": each} for each in questions]}

    data = {
        "data": [
            {"paragraphs": [paragraph("水泵漏油。", "哪里漏油", "什么")]},
            {"paragraphs": [paragraph("水泵漏油。", "谁")]},
        ]
    }
    (tmp_path / "dev.json").write_text(json.dumps(data), encoding="utf-8")
    found = load(tmp_path)
    assert found.documents == {"0": "水泵漏油。"}
    assert found.queries == {"哪里漏油?": "哪里漏油", "什么?": "什么", "谁?": "谁"}
    assert set(map(str, found.judgements.values())) == {"{'0': 1}"}


def spoil(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("queries.jsonl", None),
        ("qrels/test.tsv", None),
        ("corpus.jsonl", None),
        ("corpus.jsonl", b"{}\n"),
        ("corpus.jsonl", b"\xff\n"),
        ("queries.jsonl", b"[]\n"),
        ("qrels/test.tsv", b"q\td\tscore\n"),
        ("qrels/test.tsv", b"q\td\t1\nq1\td1\tmuch\n"),
    ],
)
def test_a_folder_that_is_no_collection_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    write_beir(tmp_path)
    spoil(tmp_path, name, content)
    with pytest.raises(InvalidRequestError, match="no test collection"):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError):
        load(tmp_path / "none")


# Evaluation


@dataclass
class Shop:
    """Answers as the vector stores do; finds files that share words with the query, a page of two at a time."""

    files: dict[str, str] = field(default_factory=dict)
    stores: set[str] = field(default_factory=set)
    waiting: int = 3
    keys: set[str] = field(default_factory=set)
    broken: str = ""

    def answer(self, method: str, path: str, body: bytes) -> Any:
        if self.broken and self.broken in path:
            return None
        if method == "DELETE":
            name = path.rpartition("/")[2]
            self.stores.discard(name)
            self.files.pop(name, None)
            return {"deleted": True}
        if path == "/v1/files":
            found = re.search(
                rb'filename="\d+\.txt"\r\nContent-Type: text/plain\r\n\r\n(.*)\r\n--\w+--\r\n$', body, re.DOTALL
            )
            assert found is not None
            self.files[f"file-{len(self.files)}"] = found[1].decode()
            return {"id": f"file-{len(self.files) - 1}"}
        if path == "/v1/vector_stores":
            self.stores.add("vs_1")
            return {"id": "vs_1"}
        if path.endswith("/search"):
            return self.search(**json.loads(body))
        self.waiting = max(0, self.waiting - 1)
        counts = {"in_progress": self.waiting, "completed": len(self.files), "failed": 0}
        return {"id": "vs_1", "file_counts": counts}

    def search(self, query: str, mode: str, max_num_results: int, after: str) -> Any:
        assert max_num_results == 50
        hits = [name for name, text in self.files.items() if set(query.split()) & set(text.split())]
        hits = [] if mode == "semantic" else sorted(hits, key=lambda name: self.files[name], reverse=True)
        first = int(after)
        return {"data": [{"file_id": each} for each in hits[first : first + 50]], "has_more": len(hits) > first + 50}


@asynccontextmanager
async def serving(shop: Shop) -> AsyncIterator[int]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                headers = dict(re.findall(r"(?m)^([\w-]+): (.*)\r$", head))
                shop.keys.add(headers.get("Authorization", ""))
                answer = shop.answer(method, path, await reader.readexactly(int(headers["Content-Length"])))
                body = json.dumps(answer).encode()
                status = "500 Broken" if answer is None else "200 OK"
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with asyncio.timeout(DEADLINE_S):
        yield server.sockets[0].getsockname()[1]
    server.close()


COLLECTION = JudgedCollection(
    documents={"a": "the pump", "b": "the oil", "c": "a holiday", "none": " "},
    queries={"1": "pump", "2": "the oil"},
    judgements={"1": {"a": 1}, "2": {"b": 1}},
)


@pytest.mark.anyio
async def test_every_mode_is_measured_and_nothing_stays_behind() -> None:
    shop = Shop()
    async with serving(shop) as port:
        result = await evaluate(Server(port, "sk-1"), COLLECTION, lambda _: None)
    assert (result.documents, result.queries) == (4, 2)
    by_mode = {each.mode: each for each in result.legs}
    assert by_mode["keyword"].ndcg_10 == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert (by_mode["hybrid"].recall_10, by_mode["hybrid"].mrr_10, by_mode["hybrid"].empty) == (1.0, 0.75, 0)
    assert (by_mode["semantic"].ndcg_10, by_mode["semantic"].empty) == (0.0, 2)
    assert (shop.stores, shop.files, shop.keys) == (set(), {}, {"Bearer sk-1"})


@pytest.mark.anyio
async def test_only_the_first_queries_are_asked_if_so_wanted() -> None:
    async with serving(Shop()) as port:
        result = await evaluate(Server(port), COLLECTION, lambda _: None, most_queries=1)
    assert (result.queries, result.legs[0].ndcg_10) == (1, 1.0)


@pytest.mark.anyio
async def test_a_server_that_fails_is_told_and_the_store_is_erased() -> None:
    shop = Shop(broken="/search")
    async with serving(shop) as port:
        with pytest.raises(UnavailableError, match="/search"):
            await evaluate(Server(port), COLLECTION, lambda _: None)
    assert (shop.stores, shop.files) == (set(), {})


@pytest.mark.anyio
async def test_the_verb_prints_a_table_or_json(tmp_path: Path) -> None:
    write_beir(tmp_path)

    def run(*options: str) -> str:
        result = CliRunner().invoke(command, ["retrieval", str(tmp_path), "--data", str(tmp_path), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    async with serving(Shop()) as port:
        table = await asyncio.to_thread(run, "--on-port", str(port))
    assert "nDCG@10" in table
    assert [line.split()[0] for line in table.splitlines()[-3:]] == ["hybrid", "keyword", "semantic"]
    async with serving(Shop()) as port:
        document = json.loads(await asyncio.to_thread(run, "--on-port", str(port), "--json"))
    assert document["documents"] == 3
    assert document["legs"][0]["mode"] == "hybrid"


def test_the_verb_refuses_a_folder_without_a_collection(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["retrieval", str(tmp_path / "none"), "--data", str(tmp_path)])
    assert result.exit_code == 5
