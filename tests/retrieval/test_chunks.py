"""How documents are cut: what every chunk keeps to, whatever the document and the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.retrieval import Chunking
from appliance.retrieval import borders
from appliance.retrieval.chunks import LONGEST_HEADING, Chunk, cut
from appliance.retrieval.parsing.document import Block, ParsedDocument

Count = Callable[[Sequence[str]], Sequence[int]]


def words(texts: Sequence[str]) -> list[int]:
    """Count as a WordPiece tokenizer does: words, each wide character by itself, and two tokens around."""
    return [2 + len(re.findall(r"[^\W\u3000-\uffff]+|[^\s]", text)) for text in texts]


def characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


def fours(texts: Sequence[str]) -> list[int]:
    """Count as a tokenizer that joins over any border."""
    return [1 + -(-len(text.encode()) // 4) for text in texts]


def lumpy(texts: Sequence[str]) -> list[int]:
    """Count so that two texts together have more tokens than one by one."""
    return [len(text.split()) + len(text) // 40 + text.count("\n") for text in texts]


def unseen(texts: Sequence[str]) -> list[int]:
    """Count as if nothing had any tokens."""
    return [0 for _ in texts]


COUNTS: list[Count] = [words, characters, fours, lumpy, unseen]
FRAGMENTS = [
    "word ",
    "a",
    "longerword",
    ". ",
    "! ",
    "。",
    "，",
    "；",
    ", ",
    "\n",
    " ",
    "中文",
    "e.g. ",
    "😀",
    "שלום ",
    "3.14",
    "|",
]
TEXTS = (
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=60).map("".join).filter(lambda text: text.strip() != "")
)
ROWS = st.lists(TEXTS.map(lambda text: " | ".join(text.split()[:4])), min_size=1, max_size=12).map("\n".join)


def blocks() -> st.SearchStrategy[Block]:
    page = st.none() | st.integers(1, 9)
    prose = st.builds(Block, st.sampled_from(["paragraph", "list", "code"]), TEXTS.map(str.strip), page)
    heading = st.builds(
        Block, st.just("heading"), TEXTS.map(lambda text: " ".join(text.split())), page, st.integers(1, 6)
    )
    table = st.builds(Block, st.just("table"), ROWS, page)
    return prose | heading | table


DOCUMENTS = st.lists(blocks(), max_size=12).map(lambda each: ParsedDocument(tuple(each)))
CHUNKINGS = st.integers(8, 60).flatmap(lambda most: st.builds(Chunking, st.just(most), st.integers(0, most // 2)))


def bare(text: str) -> str:
    return "".join(text.split())


@given(DOCUMENTS, CHUNKINGS, st.sampled_from(COUNTS))
def test_every_chunk_keeps_its_promises(document: ParsedDocument, chunking: Chunking, count: Count) -> None:
    text = document.text
    chunks = cut(document, chunking, count)
    covered = [False] * len(text)
    for chunk in chunks:
        assert chunk.tokens == count([chunk.text])[0] <= chunking.most_tokens
        body = text[chunk.start : chunk.end]
        assert body == body.strip() != ""
        if chunk.text != body:
            header = chunk.text.removesuffix(f"\n{body}")
            assert any(each.kind == "table" and each.text.startswith(header) for each in document.blocks)
        covered[chunk.start : chunk.end] = [True] * len(body)
    assert all(is_covered or character.isspace() for character, is_covered in zip(text, covered, strict=True))
    assert [each.start for each in chunks] == sorted(each.start for each in chunks)
    assert [each.end for each in chunks] == sorted(each.end for each in chunks)
    assert cut(document, chunking, count) == chunks


@given(DOCUMENTS, CHUNKINGS)
def test_overlap_stays_in_the_section_and_within_its_limit(document: ParsedDocument, chunking: Chunking) -> None:
    chunks = cut(document, chunking, words)
    for first, second in pairwise(chunks):
        if second.start < first.end:
            assert first.heading == second.heading
            assert words([document.text[second.start : first.end]])[0] - 2 <= chunking.overlap_tokens
            assert second.start > first.start
            assert second.end > first.end


@given(DOCUMENTS, CHUNKINGS)
def test_a_heading_is_inside_no_chunk_but_at_its_start(document: ParsedDocument, chunking: Chunking) -> None:
    starts, at, previous = [], 0, ""
    for block in document.blocks:
        if block.kind == "heading" and previous != "heading":
            starts.append(at)
        previous = block.kind
        at += len(block.text) + 2
    for chunk in cut(document, chunking, words):
        assert not [start for start in starts if chunk.start < start < chunk.end]


@given(DOCUMENTS, CHUNKINGS)
def test_the_tokenizer_is_called_a_few_times_only(document: ParsedDocument, chunking: Chunking) -> None:
    calls: list[int] = []

    def counting(texts: Sequence[str]) -> Sequence[int]:
        calls.append(sum(map(len, texts)))
        return words(texts)

    cut(document, chunking, counting)
    assert len(calls) <= 12
    assert sum(calls) <= 6 * len(document.text) + 64


# What people see


def parsed(*found: Block) -> ParsedDocument:
    return ParsedDocument(found)


def paragraph(text: str, page: int | None = None) -> Block:
    return Block("paragraph", text, page)


def heading(text: str, level: int) -> Block:
    return Block("heading", text, None, level)


def texts(chunks: Sequence[Chunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


def test_nothing_makes_no_chunk() -> None:
    assert cut(parsed(), Chunking(), words) == []
    assert cut(parsed(paragraph(" ")), Chunking(), words) == []
    assert cut(parsed(paragraph(" "), heading(" ", 1)), Chunking(), words) == []


def test_a_short_document_is_one_chunk_for_one_count() -> None:
    calls: list[int] = []

    def counting(given: Sequence[str]) -> Sequence[int]:
        calls.append(len(given))
        return words(given)

    (chunk,) = cut(parsed(heading("Pump", 1), paragraph("It is blue.", 3)), Chunking(), counting)
    assert chunk == Chunk("Pump\n\nIt is blue.", 0, 17, None, ("Pump",), 7)
    assert calls == [1]


def test_headings_begin_chunks_and_are_carried() -> None:
    document = parsed(
        paragraph("Before all."),
        heading("Pumps", 1),
        heading("Small", 2),
        paragraph("One.", 2),
        heading("Large", 2),
        paragraph("Two."),
        heading("Valves", 1),
        paragraph("Three."),
    )
    chunks = cut(document, Chunking(), words)
    assert [(each.text, each.heading) for each in chunks] == [
        ("Before all.", ()),
        ("Pumps\n\nSmall\n\nOne.", ("Pumps", "Small")),
        ("Large\n\nTwo.", ("Pumps", "Large")),
        ("Valves\n\nThree.", ("Valves",)),
    ]
    assert [document.text[each.start : each.end] for each in chunks] == texts(chunks)


def test_a_long_heading_is_carried_in_short() -> None:
    chunks = cut(parsed(heading("x" * 500, 1), paragraph("One.")), Chunking(), words)
    assert chunks[0].heading == ("x" * LONGEST_HEADING,)


def test_paragraphs_are_joined_while_they_fit_and_then_begin_anew() -> None:
    first, second, third = ("one two three four five six.", "seven eight nine ten.", "eleven twelve.")
    chunks = cut(parsed(paragraph(first, 1), paragraph(second, 2), paragraph(third, 2)), Chunking(12, 0), words)
    assert texts(chunks) == [first, f"{second}\n\n{third}"]
    assert [each.page for each in chunks] == [1, 2]


def test_a_paragraph_after_little_text_fills_the_chunk_by_sentences() -> None:
    chunks = cut(parsed(paragraph("Hi."), paragraph("One two. Three four. Five six. Seven.")), Chunking(10, 0), words)
    assert texts(chunks) == ["Hi.\n\nOne two. Three four.", "Five six. Seven."]


def test_a_chunk_begins_with_the_end_of_the_one_before() -> None:
    text = "Alpha beta. Gamma delta. Epsilon zeta. Eta theta. Iota kappa. Lambda mu."
    chunks = cut(parsed(paragraph(text)), Chunking(11, 3), words)
    assert texts(chunks) == [
        "Alpha beta. Gamma delta. Epsilon zeta.",
        "Epsilon zeta. Eta theta. Iota kappa.",
        "Iota kappa. Lambda mu.",
    ]


def test_chinese_is_cut_at_its_own_full_stops() -> None:
    chunks = cut(parsed(paragraph("水泵已停止。请检查阀门！“好了吗？”然后重新启动；完成")), Chunking(9, 0), words)
    assert texts(chunks) == ["水泵已停止。", "请检查阀门！", "“好了吗？”", "然后重新启动；", "完成"]


def test_a_long_sentence_is_cut_at_clauses_then_words_then_characters() -> None:
    chunks = cut(parsed(paragraph("one two, three four, five six")), Chunking(6, 0), words)
    assert texts(chunks) == ["one two,", "three four,", "five six"]
    chunks = cut(parsed(paragraph("one two three four five six seven")), Chunking(20, 0), characters)
    assert all(each.text in "one two three four five six seven" for each in chunks)
    assert " ".join(texts(chunks)) == "one two three four five six seven"
    chunks = cut(parsed(paragraph("x" * 100)), Chunking(30, 0), characters)
    assert "".join(texts(chunks)) == "x" * 100


def test_a_table_stays_whole_beside_or_after_other_text() -> None:
    table = Block("table", "a | b\n1 | 2\n3 | 4")
    before = paragraph("one two three four five six seven eight.")
    assert len(cut(parsed(before, table), Chunking(40, 0), words)) == 1
    assert texts(cut(parsed(before, table), Chunking(14, 8), words)) == [before.text, table.text]


def test_a_long_table_repeats_its_header_and_its_offsets_are_true() -> None:
    table = Block("table", "a | b\n" + "\n".join(f"{row} | x" for row in range(10)), 4)
    document = parsed(heading("Sizes", 1), table, paragraph("After."))
    chunks = cut(document, Chunking(14, 5), words)
    assert texts(chunks)[0] == "Sizes"
    assert texts(chunks)[1].startswith("a | b\n0 | x\n1 | x")
    for chunk in chunks[2:-1]:
        body = document.text[chunk.start : chunk.end]
        assert chunk.text == f"a | b\n{body}"
        assert chunk.page == 4
    assert texts(chunks)[-1] == "After."
    assert {each.heading for each in chunks} == {("Sizes",)}


def test_a_header_that_takes_too_much_is_not_repeated() -> None:
    table = Block("table", "a b c d e f\n" + "\n".join(f"row {row}" for row in range(6)))
    chunks = cut(parsed(table), Chunking(12, 0), words)
    assert texts(chunks)[0].startswith("a b c d e f\nrow 0")
    assert all(each.startswith("row ") for each in texts(chunks)[1:])


def test_a_character_that_alone_is_too_much_is_a_chunk_of_its_own() -> None:
    def heavy(given: Sequence[str]) -> list[int]:
        return [100 * len(text) for text in given]

    chunks = cut(parsed(paragraph("ab c")), Chunking(10, 0), heavy)
    assert [(each.text, each.tokens) for each in chunks] == [("a", 100), ("b", 100), ("c", 100)]


def test_where_texts_together_have_more_tokens_the_chunk_is_halved_until_it_fits() -> None:
    def joined(given: Sequence[str]) -> list[int]:
        return [len(text.split()) ** 2 for text in given]

    text = "a b. " * 6
    chunks = cut(parsed(paragraph("A b. " * 6)), Chunking(16, 0), joined)
    assert texts(chunks) == ["A b. A b."] * 3
    assert len(text.split()) == 12


def test_a_row_that_does_not_fit_below_the_header_stands_without_it() -> None:
    def crowded(given: Sequence[str]) -> list[int]:
        return [len(text.split()) + (50 if "head\nr" in text else 0) for text in given]

    table = Block("table", "head\n" + "\n".join(f"r{row} s t u v" for row in range(4)))
    chunks = cut(parsed(table), Chunking(8, 0), crowded)
    assert texts(chunks) == ["head", *(f"r{row} s t u v" for row in range(4))]


def test_a_single_sentence_that_is_longer_by_itself_than_planned_is_halved() -> None:
    def moody(given: Sequence[str]) -> list[int]:
        return [1 if text.endswith("\n") else len(text) for text in given]

    chunks = cut(parsed(paragraph("aaaa bbbbbb"), paragraph("cc")), Chunking(8, 0), moody)
    assert texts(chunks) == ["aaaa b", "bbbbb", "cc"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ("See e.g. this. Dr. No", ["See e.g. this. ", "Dr. ", "No"]),
        ("It is 3.14 wide.\nNext", ["It is 3.14 wide.\n", "Next"]),
        ('He said "no." Then left', ['He said "no." ', "Then left"]),
        ("他说：“好。”我走了。", ["他说：“好。”", "我走了。"]),
        ("Wait... What?!  Yes", ["Wait... ", "What?! ", " Yes"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in borders.sentences(text, 0, len(text))] == expected


@pytest.mark.parametrize("unit", [".", ". ", "。", "!?", ". a", '."', ". \n", ",", "\n", "a"])
def test_no_text_takes_longer_than_its_length(unit: str) -> None:
    text = unit * 200_000 + " " * 200_000 + unit
    for find in (borders.sentences, borders.clauses, borders.lines):
        assert sum(end - start for start, end in find(text, 0, len(text))) == len(text)
