"""A document is cut into passages that are found and cited by themselves.

A heading begins a chunk, and none reaches over one. Paragraphs are joined as long as they fit; one that does not is
cut between sentences, or where a sentence is too long between clauses, words, and at last characters. Tables stay whole
where they fit, else each part has the header above it.

The text is counted twice in all: in sentences, to plan, and in chunks, to be sure. Only the tokenizer knows how many
tokens two texts make together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from appliance.core.retrieval import Chunking
from appliance.retrieval import borders
from appliance.retrieval.parsing.document import BETWEEN, Block, ParsedDocument

Count = Callable[[Sequence[str]], Sequence[int]]
"""Tokens of each text as the model embeds it, those around a text included."""

LONGEST_HEADING = 200
"""Characters of a heading that are carried with each chunk below it."""
LONGEST_TOKEN = 32
"""Characters: some tokenizers make one token of a word however long, or none of what cannot be seen."""
LONGEST_SENTENCE = 8192
"""Characters: tokenizers take much memory for a text without any border, however it came about."""
HEADER_SHARE = 4
"""A table's header is repeated if it takes no more than this part of a chunk."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage.

    Attributes:
        text: As in the document; of a table's later parts with its header in front.
        start: Where it begins in the document's text, in characters, a repeated header not counted.
        end: Behind its last character.
        page: On which it begins, from 1, or None.
        heading: The headings above it, outermost first, its own included.
        tokens: Of the text, as the model embeds it.
    """

    text: str
    start: int
    end: int
    page: int | None
    heading: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Atom:
    """What is cut no further; `stop` is behind the white space that follows it, `tokens` are those it adds."""

    block: int
    start: int
    end: int
    stop: int
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    atoms: tuple[_Atom, ...]
    path: tuple[str, ...]
    header: str = ""
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Section:
    path: tuple[str, ...]
    blocks: list[int]


def cut(document: ParsedDocument, chunking: Chunking, count: Count) -> list[Chunk]:
    """Return a document's chunks in order.

    Every character but white space is in one of them, and no chunk has more than `most_tokens`, unless one character
    alone has. Chunks of one section share up to `overlap_tokens`, in whole sentences.

    Args:
        document: What was taken from a file.
        chunking: How long chunks may be, and how much of one the next repeats.
        count: Called a few times, with many texts each.
    """
    return _Cutter(document, chunking, count).run()


class _Cutter:
    def __init__(self, document: ParsedDocument, chunking: Chunking, count: Count) -> None:
        self._text = document.text
        self._blocks = document.blocks
        self._chunking = chunking
        self._count = count
        self._around = 0

    def run(self) -> list[Chunk]:
        sections = list(_sections(self._blocks))
        drafts = self._whole(sections) or self._planned(sections)
        while unsure := [each for each in drafts if each.tokens is None]:
            tokens = iter(self._count([self._text_of(each) for each in unsure]))
            drafts = [
                sure
                for each in drafts
                for sure in ([each] if each.tokens is not None else self._checked(each, next(tokens)))
            ]
        return [self._chunk(each) for each in drafts]

    def _whole(self, sections: list[_Section]) -> list[_Draft]:
        """Return a short document of one section as one draft: most files of many small ones need one count only."""
        if len(sections) != 1 or len(self._text) > 4 * self._chunking.most_tokens:
            return []
        start, end = borders.trimmed(self._text, 0, len(self._text))
        draft = _Draft((_Atom(0, start, end, end),), sections[0].path)
        (tokens,) = self._count([self._text[start:end]])
        return [replace(draft, tokens=tokens)] if start < end and tokens <= self._chunking.most_tokens else []

    def _planned(self, sections: list[_Section]) -> list[_Draft]:
        atoms = self._atoms()
        return [
            draft
            for section in sections
            for draft in _Packer(self._text, self._blocks, self._chunking, self._around, section).pack(atoms)
        ]

    # Atoms

    def _atoms(self) -> list[list[_Atom]]:
        """Return each block's atoms, with their tokens."""
        atoms = [atom for index, span in enumerate(self._spans()) for atom in self._first_atoms(index, *span)]
        self._around, *tokens = self._count(["", *(self._text[each.start : each.stop] for each in atoms)])
        atoms = [self._with_tokens(atom, number) for atom, number in zip(atoms, tokens, strict=True)]
        room = self._rooms(atoms)
        split = self._clauses
        while over := [each for each in atoms if each.tokens > room[each.block] and each.end - each.start > 1]:
            parts = {each: split(each, room[each.block]) for each in over}
            texts = [self._text[part.start : part.stop] for each in over for part in parts[each]]
            counted = iter(self._count(texts))
            finer = {each: [self._with_tokens(part, next(counted)) for part in parts[each]] for each in over}
            atoms = [part for each in atoms for part in finer.get(each, [each])]
            split = self._pieces
        found: list[list[_Atom]] = [[] for _ in self._blocks]
        for index, group in groupby(atoms, key=lambda each: each.block):
            found[index] = list(group)
        return found

    def _with_tokens(self, atom: _Atom, tokens: int) -> _Atom:
        return replace(atom, tokens=max(tokens - self._around, (atom.end - atom.start) // LONGEST_TOKEN, 1))

    def _rooms(self, atoms: list[_Atom]) -> list[int]:
        """Return how many tokens an atom of each block may add: below a repeated header less."""
        room = [self._chunking.most_tokens - self._around] * len(self._blocks)
        for index, group in groupby(atoms, key=lambda each: each.block):
            if self._blocks[index].kind == "table":
                room[index] -= header_tokens(next(group), room[index])
        return room

    def _spans(self) -> Iterator[borders.Span]:
        start = 0
        for block in self._blocks:
            yield start, min(start + len(block.text) + len(BETWEEN), len(self._text))
            start += len(block.text) + len(BETWEEN)

    def _first_atoms(self, index: int, start: int, stop: int) -> list[_Atom]:
        """Return a block's sentences, or its lines where these stand by themselves."""
        is_prose = self._blocks[index].kind in ("paragraph", "heading")
        spans = (borders.sentences if is_prose else borders.lines)(self._text, start, stop)
        short = (piece for start, stop in spans for piece in borders.pieces(self._text, start, stop, LONGEST_SENTENCE))
        return self._made(index, short)

    def _clauses(self, atom: _Atom, room: int) -> list[_Atom]:
        parts = self._made(atom.block, borders.clauses(self._text, atom.start, atom.stop))
        return parts if len(parts) > 1 else self._pieces(atom, room)

    def _pieces(self, atom: _Atom, room: int) -> list[_Atom]:
        """Return parts that are likely to fit, each at most half the atom."""
        length = atom.end - atom.start
        size = max(min(length * 7 * max(room, 1) // (8 * atom.tokens), length // 2), 1)
        return self._made(atom.block, borders.pieces(self._text, atom.start, atom.end, size))

    def _made(self, index: int, spans: Iterator[borders.Span]) -> list[_Atom]:
        made = []
        for start, stop in spans:
            first, end = borders.trimmed(self._text, start, stop)
            if first < end:
                made.append(_Atom(index, first, end, stop))
        return made

    # Drafts

    def _text_of(self, draft: _Draft) -> str:
        text = self._text[draft.atoms[0].start : draft.atoms[-1].end]
        return f"{draft.header}\n{text}" if draft.header else text

    def _checked(self, draft: _Draft, tokens: int) -> list[_Draft]:
        """Return a draft that is counted; one that is too long in smaller ones, which are not."""
        atoms, (first, *others) = draft.atoms, draft.atoms
        if tokens <= self._chunking.most_tokens:
            return [replace(draft, tokens=tokens)]
        if others:
            middle = len(atoms) // 2
            return [replace(draft, atoms=atoms[:middle]), replace(draft, atoms=atoms[middle:])]
        if draft.header:
            return [replace(draft, header="")]
        if first.end - first.start == 1:
            return [replace(draft, tokens=tokens)]
        half = (first.end - first.start + 1) // 2
        parts = self._made(first.block, borders.pieces(self._text, first.start, first.end, half))
        return [replace(draft, atoms=(part,)) for part in parts]

    def _chunk(self, draft: _Draft) -> Chunk:
        first, last = draft.atoms[0], draft.atoms[-1]
        page = self._blocks[first.block].page
        return Chunk(self._text_of(draft), first.start, last.end, page, draft.path, draft.tokens or 0)


class _Packer:
    """Fills the chunks of one section."""

    def __init__(self, text: str, blocks: Sequence[Block], chunking: Chunking, around: int, section: _Section) -> None:
        self._text = text
        self._blocks = blocks
        self._room = chunking.most_tokens - around
        self._overlap = chunking.overlap_tokens
        self._section = section
        self._drafts: list[_Draft] = []
        self._open: list[_Atom] = []
        self._before: list[_Atom] = []

    def pack(self, atoms: Sequence[Sequence[_Atom]]) -> list[_Draft]:
        for index in self._section.blocks:
            size = _tokens(atoms[index])
            if _tokens(self._open) + size <= self._room:
                self._open += atoms[index]
            elif self._blocks[index].kind == "table":
                self._table(atoms[index])
            elif size <= self._room and 2 * _tokens(self._open) >= self._room:
                self._turn(size)
                self._open += atoms[index]
            else:
                self._fill(atoms[index])
        self._close()
        return self._drafts

    def _fill(self, atoms: Sequence[_Atom]) -> None:
        filled = _tokens(self._open)
        for atom in atoms:
            if self._open and filled + atom.tokens > self._room:
                self._turn(atom.tokens)
                filled = _tokens(self._open)
            self._open.append(atom)
            filled += atom.tokens

    def _table(self, rows: Sequence[_Atom]) -> None:
        """Add a table that does not fit beside what is open: by itself, whole or in parts with its header."""
        self._close()
        header = ""
        repeated = header_tokens(rows[0], self._room)
        filled = 0
        for row in rows:
            if self._open and filled + row.tokens > self._room:
                self._close(header)
                header = self._text[rows[0].start : rows[0].end] if repeated else ""
                filled = repeated
            self._open.append(row)
            filled += row.tokens
        self._close(header)
        self._before = []

    def _turn(self, size: int) -> None:
        """Close the chunk and begin the next with the end of it, as far as the overlap and what comes next allow."""
        self._close()
        left = min(self._overlap, self._room - size)
        shared: list[_Atom] = []
        for atom in reversed(self._before[1:]):
            left -= atom.tokens
            if left < 0 or self._blocks[atom.block].kind in ("heading", "table"):
                break
            shared.append(atom)
        self._open = shared[::-1]

    def _close(self, header: str = "") -> None:
        if self._open:
            self._drafts.append(_Draft(tuple(self._open), self._section.path, header))
        self._before, self._open = self._open, []


def header_tokens(first_row: _Atom, room: int) -> int:
    """Return the tokens of a table's header where it is repeated, else 0."""
    return first_row.tokens if HEADER_SHARE * first_row.tokens <= room else 0


def _tokens(atoms: Sequence[_Atom]) -> int:
    return sum(atom.tokens for atom in atoms)


def _sections(blocks: Sequence[Block]) -> Iterator[_Section]:
    """Yield what stands between headings; headings without text between them begin one section together."""
    above: list[Block] = []
    section = _Section((), [])
    previous = None
    for index, block in enumerate(blocks):
        if block.kind == "heading":
            above = [each for each in above if each.level < block.level] + [block]
            path = tuple(each.text[:LONGEST_HEADING] for each in above)
            if previous is None or previous.kind == "heading":
                section = _Section(path, section.blocks)
            else:
                yield section
                section = _Section(path, [])
        section.blocks.append(index)
        previous = block
    if section.blocks:
        yield section
