"""Answers within a grammar: llguidance's home.

A grammar is compiled once, off the worker's step, and every choice gets a matcher of its own, which the worker's thread
moves along with the choice's tokens. The matcher is no part of the KV memory, so it outlives preemption and recompute.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama

GRAMMARS_AT_ONCE = 2
"""Grammars that are compiled side by side; more would take the CPU from the answers."""
CACHED_GRAMMARS = 32
CACHED_CHARACTERS = 512 * 1024
"""Compiled grammars that are kept for who sends the same again; each takes up to a few hundred bytes a character."""
COMPILING_LIMIT_S = 5.0
TRIAL_TOKENS = 4
"""Steps into a grammar that are tried before it is accepted; the first ones are often the widest."""
MOST_WORDS = 300
"""Characters of llguidance's own words in an error; they may quote the client's grammar."""
_SPECIAL = b"\xff"
"""What llguidance expects in front of a token that stands for no text."""
_LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=250_000)
"""Its own limits bound a step of the worker to some milliseconds."""
_JSON_OPTIONS: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n]?",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
"""They override what a schema says of them itself under `x-guidance`."""

T = TypeVar("T")
Allowed = npt.NDArray[np.bool_]
"""For each token id, whether it may come next."""


class Constraint:
    """How far one choice has come in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocabulary_size: int, param: str) -> None:
        """Begin; the matcher is this object's alone."""
        self._matcher = matcher
        self._vocabulary_size = vocabulary_size
        self._param = param

    @property
    def complete(self) -> bool:
        """Return True once the grammar allows nothing more."""
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> bool:
        """Move along if the grammar allows the token next; False leaves everything as it was."""
        return self._matcher.try_consume_tokens([token]) == 1

    def allowed(self) -> Allowed:
        """Return which tokens may come next.

        Raises:
            InvalidRequestError: The grammar is too complex to tell, or allows none of the model's tokens.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocabulary_size, bitorder="little").view(np.bool_)
        if self._matcher.is_error() or not allowed.any():
            raise _refusal(f"The grammar cannot be followed: {_first_line(self._matcher.get_error())}", self._param)
        return allowed


class Grammars:
    """Compiles grammars for one model's vocabulary, and keeps the last ones. Used on the event loop."""

    def __init__(self, model: LlamaModel) -> None:
        """Read nothing yet: the vocabulary is read for the first grammar, which takes up to a second."""
        self._model = model
        self._permits = asyncio.Semaphore(GRAMMARS_AT_ONCE)
        self._reading = asyncio.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    async def constrain(self, grammar: Grammar | None, count: int) -> Sequence[Constraint]:
        """Return what holds so many choices to a grammar, at its beginning; nothing where there is no grammar.

        Raises:
            InvalidRequestError: The grammar is wrong, too large, or has features that are not supported.
            EngineError: The model was unloaded.
        """
        if grammar is None:
            return ()
        key = (grammar.kind, grammar.text)
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = await self._off_the_loop(partial(_compile, await self._vocabulary(), grammar), grammar)
            self._keep(key, matcher)
        self._compiled.move_to_end(key)
        size = self._model.vocabulary_size
        return [Constraint(matcher.deep_copy(), size, grammar.param) for _ in range(count)]

    def _keep(self, key: tuple[str, str], matcher: LLMatcher) -> None:
        self._compiled[key] = matcher
        while len(self._compiled) > 1 and sum(len(text) for _, text in self._compiled) > CACHED_CHARACTERS:
            self._compiled.popitem(last=False)
        if len(self._compiled) > CACHED_GRAMMARS:
            self._compiled.popitem(last=False)

    async def _vocabulary(self) -> LLTokenizer:
        async with self._reading:
            if self._tokenizer is None:
                self._tokenizer = await self._off_the_loop(partial(_tokenizer, self._model), None)
            return self._tokenizer

    async def _off_the_loop(self, work: Callable[[], T], grammar: Grammar | None) -> T:
        """Do the work in a thread. Who gives up does not make room for another: native code cannot be interrupted."""
        await self._permits.acquire()
        done = asyncio.ensure_future(asyncio.to_thread(work))
        done.add_done_callback(self._release)
        if grammar is None:
            return await asyncio.shield(done)
        try:
            async with asyncio.timeout(COMPILING_LIMIT_S):
                return await asyncio.shield(done)
        except TimeoutError as error:
            problem = f"The grammar was not compiled within {COMPILING_LIMIT_S:g} s"
            raise _refusal(problem, grammar.param) from error

    def _release(self, done: asyncio.Future[Any]) -> None:
        self._permits.release()
        if not done.cancelled():
            done.exception()  # whoever waited has been told; who gave up need not be


def _compile(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Return a matcher at the beginning of a grammar, after a few steps have been tried on a copy of it."""
    try:
        text = _llguidance_grammar(grammar)
    except (ValueError, RecursionError, GbnfToLarkError) as error:
        raise _refusal(_first_line(str(error)), grammar.param) from error
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # so that what it costs is paid here, once
    trial = matcher.deep_copy()
    for _ in range(TRIAL_TOKENS):
        allowed = np.unpackbits(np.frombuffer(trial.compute_bitmask(), np.uint8), bitorder="little")
        if trial.is_stopped() or not trial.consume_token(int(allowed.argmax())):
            break
    if trial.is_error():
        raise _refusal(_first_line(trial.get_error()), grammar.param)
    return matcher


def _tokenizer(model: LlamaModel) -> LLTokenizer:
    """Return llguidance's view of a vocabulary: the bytes that each token adds to a text, and which end one."""
    function = ctypes.cast(llama._lib.llama_tokenize, ctypes.c_void_p).value  # noqa: SLF001  (as llguidance does it)
    with model.vocabulary() as (handle, tokens):
        return LLTokenizer.from_llamacpp(  # type: ignore[attr-defined,no-any-return]
            tokens=[_SPECIAL + text if special else text for text, special in tokens],
            vocab_ptr=handle,
            tokenize_fptr=function,
            eos_token=sorted(model.end_tokens),
            slices=None,
        )


def _llguidance_grammar(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            return str(LLMatcher.grammar_from_json_schema('{"type":"object"}', overrides=_JSON_OPTIONS))
        case "json_schema":
            return str(LLMatcher.grammar_from_json_schema(grammar.text, overrides=_JSON_OPTIONS))
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.text))
        case "lark":
            return str(LLMatcher.grammar_from_lark(grammar.text))
        case "gbnf":
            return str(LLMatcher.grammar_from_lark(any_to_lark(grammar.text)))


_WORDS = (
    ("oneOf constraints are not supported", "oneOf is not supported where a value may satisfy two of its alternatives"),
    ("Unimplemented keys: ", "The schema has keywords that are not supported: "),
    ("Resource ", "The schema has a $ref that leads out of it, and nothing is fetched: "),
    ("NoExtensionBias", "No text satisfies the grammar"),
)
"""How llguidance's words begin, and ours."""
_WITHIN_LARK = "failed to compile JSON schema: "
"""Stands before them where the schema is a part of a Lark grammar, as a tool's is."""


def _first_line(problem: str) -> str:
    line = problem.partition("\n")[0].strip()[:MOST_WORDS] or "It allows none of the model's tokens"
    line = line.partition(" is not present in a registry")[0].rpartition(_WITHIN_LARK)[2]
    for theirs, ours in _WORDS:
        if line.startswith(theirs):
            return ours + (line.removeprefix(theirs) if ours.endswith(": ") else "")
    return line


def _refusal(problem: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"{problem.rstrip('.')}.", param=param, code="invalid_grammar")
