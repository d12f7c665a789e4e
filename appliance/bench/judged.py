"""Documents, queries and which answers which, as test collections come: BEIR's form, or SQuAD's as CMRC2018 has it."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from appliance.bench.ranking import Judgements
from appliance.core.errors import InvalidRequestError

T = TypeVar("T")

FORMS = (
    "It must have corpus.jsonl, queries.jsonl and qrels/test.tsv (BEIR's form, the first two perhaps with .gz), "
    "or one JSON file in SQuAD's form."
)


@dataclass(frozen=True, slots=True)
class JudgedCollection:
    """A test collection; every query has a relevant document, and every judged document is there.

    Attributes:
        documents: Texts by id; a title stands above the text.
        queries: By id.
        judgements: By query.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    judgements: dict[str, Judgements]


class _Document(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    text: str
    title: str = ""


class _Query(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    text: str


class _Question(msgspec.Struct):
    id: str
    question: str


class _Paragraph(msgspec.Struct):
    context: str
    qas: list[_Question]


class _Article(msgspec.Struct):
    paragraphs: list[_Paragraph]


class _Squad(msgspec.Struct):
    data: list[_Article]


def load(folder: Path) -> JudgedCollection:
    """Read a test collection.

    Raises:
        InvalidRequestError: The folder has none, or one that cannot be read.
    """
    try:
        collection = _beir(folder) if _either(folder, "corpus.jsonl") else _squad(folder)
    except (OSError, EOFError, UnicodeDecodeError, msgspec.DecodeError, ValueError) as error:
        raise _bad(folder, str(error)) from error
    if not collection.queries:
        raise _bad(folder, "no query has a relevant document")
    return collection


def _beir(folder: Path) -> JudgedCollection:
    documents = {each.id: f"{each.title}\n\n{each.text}".strip() for each in _lines(folder, "corpus.jsonl", _Document)}
    judgements: dict[str, dict[str, int]] = {}
    for query, document, grade in _qrels(folder):
        if document in documents and grade > 0:
            judgements.setdefault(query, {})[document] = grade
    queries = {each.id: each.text for each in _lines(folder, "queries.jsonl", _Query) if each.id in judgements}
    return JudgedCollection(documents, queries, {query: judgements[query] for query in queries})


def _squad(folder: Path) -> JudgedCollection:
    files = sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise _bad(folder, f"it has {len(files)} JSON files")
    squad = msgspec.json.decode(files[0].read_bytes(), type=_Squad)
    paragraphs = [paragraph for article in squad.data for paragraph in article.paragraphs]
    ids = {text: str(number) for number, text in enumerate(dict.fromkeys(each.context for each in paragraphs))}
    asked = [(each, ids[paragraph.context]) for paragraph in paragraphs for each in paragraph.qas]
    return JudgedCollection(
        documents={number: text for text, number in ids.items()},
        queries={question.id: question.question for question, _ in asked},
        judgements={question.id: {number: 1} for question, number in asked},
    )


def _lines(folder: Path, name: str, kind: type[T]) -> Iterator[T]:
    path = _either(folder, name)
    if path is None:
        raise _bad(folder, f"{name} is missing")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            if line.strip():
                yield msgspec.json.decode(line, type=kind)


def _qrels(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield query, document and grade; BEIR's first line is a heading, trec's has four columns and none."""
    path = next((each for each in (folder / "qrels" / "test.tsv", folder / "qrels.test.tsv") if each.exists()), None)
    if path is None:
        raise _bad(folder, "qrels/test.tsv is missing")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        fields = line.split("\t")
        if number == 0 and not fields[-1].lstrip("-").isdigit():
            continue
        yield fields[0], fields[-2], int(fields[-1])


def _either(folder: Path, name: str) -> Path | None:
    return next((each for each in (folder / name, folder / f"{name}.gz") if each.exists()), None)


def _bad(folder: Path, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{folder} has no test collection that can be read: {reason}.", advice=FORMS, param="folder"
    )
