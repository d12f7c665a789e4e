"""What a model is calibrated and compared on, by what it is for: texts or tensors, given or made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from appliance.core.errors import InvalidRequestError
from appliance.core.tensors import ModelSignature
from appliance.engine.onnx.folder import read_encoder_files
from appliance.engine.onnx.heads import answer_of
from appliance.engine.onnx.samples import SENTENCES, ArrayFiles, MadeUp, Samples, read_sentences
from appliance.engine.onnx.tokenizer import TextTokenizer
from appliance.engine.onnx.tokens import TokenCollation, token_inputs
from appliance.engine.onnx.work import Arrays, Item

TEXTS_A_RUN = 8

MOST_TOKENS = 512
"""Of a text, even where the model reads more: ranges and times of longer ones are of little use here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Inputs of a model, and what of its outputs counts.

    Attributes:
        samples: Inputs, one set for each run.
        data: What they are, in words.
        is_made_up: They have nothing to do with what the model is for.
        has_lengths: The second dimension of each input is a number of tokens.
        read: Makes what is compared of the outputs of a run; given its number too.
    """

    samples: Samples
    data: str
    is_made_up: bool = False
    has_lengths: bool = False
    read: Callable[[int, Arrays], Arrays] = field(default=lambda number, outputs: outputs)  # noqa: ARG005

    def __len__(self) -> int:
        return len(self.samples)

    def parted(self) -> tuple[Trial, Trial]:
        """Return what to calibrate with, and the fourth of it to measure on what was not seen; few serve for both."""
        if len(self) < 8:
            return self, replace(self, data=f"{self.data}, the same as for calibration")
        seen = [each for each in range(len(self)) if each % 4 != 3]
        unseen = range(3, len(self), 4)
        return self._part(seen), replace(self._part(unseen), data=f"{self.data}, each fourth, not used for calibration")

    def _part(self, chosen: Sequence[int]) -> Trial:
        return replace(
            self,
            samples=_Chosen(self.samples, chosen),
            read=lambda number, outputs: self.read(chosen[number], outputs),
        )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Some of the samples."""

    samples: Samples
    chosen: Sequence[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Arrays:
        return self.samples[self.chosen[index]]


def trial_of(
    task: str, signature: ModelSignature, graph: Path, path: Path | None, *, can_run: Callable[[Arrays], bool]
) -> Trial:
    """Return the trial of a model that is for `task`, as `text_trial` or `tensor_trial`, which raise the errors."""
    if task == "tensor" or not (graph.parent / "tokenizer.json").exists():
        return tensor_trial(signature, path, can_run)
    return text_trial(signature, graph.parent, path, is_pairs=task == "rerank")


def tensor_trial(signature: ModelSignature, path: Path | None, can_run: Callable[[Arrays], bool]) -> Trial:
    """Return the trial of a model of tensors.

    Args:
        signature: Of the model.
        path: A folder of .npz files, or None for made-up inputs.
        can_run: Tells whether the model runs with inputs.

    Raises:
        NotFoundError: There is no such folder.
        InvalidRequestError: The path is no such folder, or nothing could be made up.
    """
    if path is None:
        made_up = MadeUp(signature, can_run)
        return Trial(samples=made_up, data="random numbers", is_made_up=True)
    if path.is_file():
        raise InvalidRequestError(
            f"{path} is a file, and the model takes tensors and not texts.",
            advice="Name a folder of .npz files.",
            param="samples",
        )
    files = ArrayFiles(path, signature)
    return Trial(samples=files, data=f"{len(files):,} files of {path}")


def text_trial(signature: ModelSignature, folder: Path, path: Path | None, *, is_pairs: bool) -> Trial:
    """Return the trial of a model for texts, whose tokenizer and configuration lie in its folder.

    Args:
        signature: Of the model.
        folder: Its files, as Hugging Face lays them out.
        path: A .txt or .jsonl file of sentences, or None for made-up ones.
        is_pairs: It reads two texts together.

    Raises:
        NotFoundError: There is no such file.
        InvalidRequestError: It has no sentences.
        ModelFileError: The model's files are damaged, or do not fit its graph.
    """
    if path is not None and path.is_dir():
        raise InvalidRequestError(
            f"{path} is a folder, and the model reads texts.",
            advice="Name a .txt file with one sentence a line, or a .jsonl file.",
            param="samples",
        )
    texts = _Texts(signature, folder, SENTENCES if path is None else read_sentences(path), is_pairs=is_pairs)
    return Trial(
        samples=texts,
        data="a dozen sentences of ours" if path is None else f"{texts.count:,} sentences of {path.name}",
        is_made_up=path is None,
        has_lengths=True,
        read=texts.read,
    )


class _Texts:
    """Sentences as the model reads them, several to a run where it allows for that, and what it makes of them."""

    def __init__(self, signature: ModelSignature, folder: Path, sentences: Sequence[str], *, is_pairs: bool) -> None:
        files, inputs = read_encoder_files(folder), token_inputs(signature)
        answer = answer_of(signature, files)
        self._tokenizer = TextTokenizer(
            folder / "tokenizer.json", vocabulary_size=files.vocabulary_size, lower_case=files.lower_case
        )
        self._collation = TokenCollation(inputs, answer, padding_id=files.padding_id)
        self._longest = min(MOST_TOKENS, *files.lengths.values(), inputs.fixed_length or MOST_TOKENS)
        self._name = "embedding" if answer.dimensions else "probability"
        self._is_pairs = is_pairs
        step = TEXTS_A_RUN if inputs.key(1) == inputs.key(2) is not None else 1
        self._runs = [sentences[first : first + step] for first in range(0, len(sentences), step)]
        self.count = len(sentences)

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index: int) -> Arrays:
        return self._collation.collate(self._items(index))

    def read(self, index: int, outputs: Arrays) -> Arrays:
        """Return a vector, or the probabilities of labels, for each text."""
        return {self._name: np.array(self._collation.split(outputs, self._items(index)), np.float32)}

    def _items(self, index: int) -> list[Item]:
        texts = self._runs[index]
        if self._is_pairs:
            rows = self._tokenizer.pairs(self._runs[index - 1][0], texts, self._longest)
        else:
            rows = self._tokenizer.texts(texts, self._longest)
        return [self._collation.item(each) for each in rows]
