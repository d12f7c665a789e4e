"""Texts in front of a session: embeddings, scores of pairs and classes of texts, from the model's own files.

An embedding has length 1, as all vectors here and those of OpenAI do, even where the model's files do not ask for it.
The score of a pair is the sigmoid of the cross-encoder's one logit, also where its files leave the logit as it is: that
changes no order.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from appliance.core.errors import InvalidRequestError, ModelFileError
from appliance.core.tensors import ModelSignature
from appliance.core.types import Priority, Vector
from appliance.engine.onnx.engine import OnnxEngine
from appliance.engine.onnx.folder import read_encoder_files
from appliance.engine.onnx.heads import Answer, answer_of
from appliance.engine.onnx.tokenizer import Row, TextTokenizer
from appliance.engine.onnx.tokens import TokenCollation, token_inputs

INLINE_CHARACTERS = 4_000
"""Texts up to this length together are tokenized on the loop, in about 2 ms; a thread costs more than it saves."""
TEXT_CHARACTERS = 32
"""As many characters take the time that a text takes by itself."""

TOO_LONG_ADVICE = "Split it, set `truncate`, or raise `max_embedding_tokens` if the model was trained on more."

Input = str | Sequence[int]

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What the files make of the model."""

    answer: Answer
    tokenizer: TextTokenizer
    collation: TokenCollation
    longest_input: int
    matryoshka: bool


class OnnxEncoder:
    """One ONNX model for texts. After `prepare`, its attributes are what the model's files say.

    Attributes:
        name: The full `name:version`, for answers and metrics.
        engine: The session that evaluates.
    """

    def __init__(self, engine: OnnxEngine, folder: Path, *, most_tokens: int) -> None:
        """Stand before a session; `prepare` reads the files.

        Args:
            engine: The loaded graph.
            folder: Where `tokenizer.json` and the configuration lie, as Hugging Face lays them out.
            most_tokens: Longest input in tokens, where the model was not trained on less.
        """
        self.name = engine.name
        self.engine = engine
        self._folder = folder
        self._most_tokens = most_tokens
        self._made: _Prepared | None = None
        self._off_loop = asyncio.Lock()

    async def prepare(self) -> None:
        """Read the tokenizer and the configuration, off the loop.

        Raises:
            ModelFileError: A file is missing, damaged, or does not fit the graph.
        """
        self._made = await asyncio.to_thread(_prepared, self.engine.signature, self._folder, self._most_tokens)

    # What the model is

    @property
    def _is(self) -> _Prepared:
        assert self._made is not None, "the encoder is prepared"
        return self._made

    @property
    def dimensions(self) -> int:
        """Return how many numbers a vector has, or 0 if the model gives logits."""
        return self._is.answer.dimensions

    @property
    def longest_input(self) -> int:
        """Return how many tokens an input may have, those that the model wants around it included."""
        return self._is.longest_input

    @property
    def pooling(self) -> str:
        """Return how the states of an input's tokens become one vector; `graph` is in the graph, "" not at all."""
        return self._is.answer.pooling

    @property
    def is_matryoshka(self) -> bool:
        """Return True if the start of a vector is known to be one itself: the model was trained so."""
        return self._is.matryoshka

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the classes of a classifier, in the order of its probabilities; of other models none."""
        return self._is.answer.labels

    @property
    def exclusive(self) -> bool:
        """Return True if the probabilities of the labels add up to 1; otherwise each label stands alone."""
        return self._is.answer.exclusive

    @property
    def scores(self) -> bool:
        """Return True if the model is a cross-encoder: it reads two texts together and gives one logit."""
        return len(self.labels) == 1

    # Work

    async def tokenize(self, inputs: Sequence[Input], *, truncate: bool) -> tuple[list[array[int]], list[int]]:
        """Return each input's token ids, and the indices of the inputs that were cut.

        A text's ids have those that the model wants around it, ids are just these. Many or long texts do not hold up
        the loop.

        Raises:
            InvalidRequestError: An input is empty, has unknown ids, or is too long and not to be truncated.
        """
        texts = [each for each in inputs if isinstance(each, str)]
        longest = self.longest_input
        rows = iter(await self._tokenized(texts, lambda: self._is.tokenizer.texts(texts, longest)))
        given = [next(rows) if isinstance(each, str) else self._as_given(each, at) for at, each in enumerate(inputs)]
        self._check(given, "input[{}]", truncate=truncate)
        return [each.tokens for each in given], _cut(given)

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, uncut, those that the model wants around it included.

        Raises:
            EngineError: The tokenizer failed on them.
        """
        return await self._tokenized(texts, lambda: self._is.tokenizer.counts(texts))

    async def embed(
        self,
        inputs: Sequence[array[int]],
        *,
        priority: Priority = Priority.DEFAULT,
        deadline_s: float | None = None,
    ) -> Sequence[Vector]:
        """Return a vector of length 1 for each input. Leaving cancels, and nobody else notices.

        Args:
            inputs: As `tokenize` returns them.
            priority: Order of admission.
            deadline_s: Seconds from now after which the work is given up, or None.

        Raises:
            InvalidRequestError: The model does not embed.
            OverloadedError: The queue is full.
            UnavailableError: The model failed too often of late.
            DeadlineExceededError: It took longer than `deadline_s`.
            EngineError: An input could not be evaluated, or the thread has ended.
        """
        if not self.dimensions:
            raise self._unfit("embed", "Use a model for embeddings.")
        return await self._run([Row(each, None, len(each)) for each in inputs], priority, deadline_s)

    async def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        truncate: bool,
        priority: Priority = Priority.DEFAULT,
        deadline_s: float | None = None,
    ) -> tuple[list[float], list[int], list[int]]:
        """Return how well each document answers the query.

        Returns:
            Scores from 0 to 1; the tokens of each pair as it was evaluated; the indices of the documents whose pair was
            cut.

        Raises:
            InvalidRequestError: The model is no cross-encoder, or a pair is too long and not to be truncated.
            ApplianceError: As `embed`.
        """
        if not self.scores:
            raise self._unfit("score pairs", "Use a cross-encoder, which gives one logit.")
        longest = self.longest_input
        rows = await self._tokenized([query, *documents], lambda: self._is.tokenizer.pairs(query, documents, longest))
        self._check(rows, "documents[{}] with the query", truncate=truncate)
        scores = await self._run(rows, priority, deadline_s)
        return [each[0] for each in scores], [len(each.tokens) for each in rows], _cut(rows)

    async def classify(
        self,
        inputs: Sequence[str],
        *,
        truncate: bool,
        priority: Priority = Priority.DEFAULT,
        deadline_s: float | None = None,
    ) -> tuple[list[list[float]], list[int], list[int]]:
        """Return the probability of each label for each text.

        Returns:
            The probabilities in the order of `labels`; the tokens of each text as it was evaluated; the indices of
            those that were cut.

        Raises:
            InvalidRequestError: The model does not classify, or a text is too long and not to be truncated.
            ApplianceError: As `embed`.
        """
        if not self.labels:
            raise self._unfit("classify", "Use a model for sequence classification.")
        longest = self.longest_input
        rows = await self._tokenized(inputs, lambda: self._is.tokenizer.texts(inputs, longest))
        self._check(rows, "input[{}]", truncate=truncate)
        probabilities = await self._run(rows, priority, deadline_s)
        return [each.tolist() for each in probabilities], [len(each.tokens) for each in rows], _cut(rows)

    async def _run(self, rows: Sequence[Row], priority: Priority, deadline_s: float | None) -> list[array[float]]:
        if not rows:
            return []
        collation = self._is.collation
        items = [collation.item(each) for each in rows]
        answers = await self.engine.submit(items, collation, priority=priority, deadline_s=deadline_s)
        self.engine.count_prompt_tokens(sum(len(each.tokens) for each in rows))
        return answers

    async def _tokenized(self, texts: Sequence[str], tokenize: Callable[[], _Result]) -> _Result:
        """Tokenize here, or where that takes long in a thread: one at a time, as the engines need the cores."""
        if sum(map(len, texts)) + TEXT_CHARACTERS * len(texts) <= INLINE_CHARACTERS:
            return tokenize()
        async with self._off_loop:
            return await asyncio.to_thread(tokenize)

    def _as_given(self, tokens: Sequence[int], index: int) -> Row:
        size = self._is.tokenizer.vocabulary_size
        if tokens and not (min(tokens) >= 0 and max(tokens) < size):
            raise InvalidRequestError(f"input[{index}] has token ids outside 0 to {size - 1}.", param="input")
        return Row(array("i", tokens[: self.longest_input]), None, len(tokens))

    def _check(self, rows: Sequence[Row], place: str, *, truncate: bool) -> None:
        param = place.partition("[")[0]
        for index, row in enumerate(rows):
            if not row.tokens:
                raise InvalidRequestError(f"{place.format(index)} has no tokens.", param=param, code="empty_prompt")
            if _is_cut(row) and not truncate:
                count = f"{row.whole}" if row.counted else f"over {row.whole}"
                raise InvalidRequestError(
                    f"{place.format(index)} has {count} tokens; {self.name} reads up to {self.longest_input}.",
                    advice=TOO_LONG_ADVICE,
                    param=param,
                    code="context_length_exceeded",
                )

    def _unfit(self, task: str, advice: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.name} does not {task}.", advice=advice, param="model")


def _cut(rows: Sequence[Row]) -> list[int]:
    return [index for index, row in enumerate(rows) if _is_cut(row)]


def _is_cut(row: Row) -> bool:
    return row.whole > len(row.tokens) or not row.counted


# Preparation


def _prepared(signature: ModelSignature, folder: Path, most_tokens: int) -> _Prepared:
    files = read_encoder_files(folder)
    inputs = token_inputs(signature)
    tokenizer = TextTokenizer(
        folder / "tokenizer.json",
        vocabulary_size=files.vocabulary_size,
        lower_case=files.lower_case,
        prompt=files.prompt,
    )
    limits = [most_tokens, *files.lengths.values()]
    longest = min(limits if inputs.fixed_length is None else [*limits, inputs.fixed_length])
    if longest <= tokenizer.added:
        raise ModelFileError(
            f"The model's inputs may have {longest} tokens, of which the tokenizer adds {tokenizer.added} itself.",
            advice="Correct `max_seq_length` or `model_max_length` in the model's files.",
        )
    answer = answer_of(signature, files)
    return _Prepared(
        answer=answer,
        tokenizer=tokenizer,
        collation=TokenCollation(inputs, answer, padding_id=files.padding_id),
        longest_input=longest,
        matryoshka=files.matryoshka,
    )
