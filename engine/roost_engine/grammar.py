"""Grammars: which tokens may come next so that an answer has the form it must have.

A shell around llguidance (Rust; no torch): JSON schema, regular expressions, choices and
context-free grammars become a parser over bytes, and the parser a mask over the vocabulary for
each step: some 10 to 100 microseconds in a row, a few milliseconds at the first step of a schema.

    spec --compile (once per spec, worker thread)--> prototype --copy (10 us)--> GrammarState

Compiling is bounded by llguidance's own limits on the size of grammars and automata, and by the
size of a spec (structured_api.py): about a second at the worst. It releases the interpreter. The
first mask is made while compiling. Some grammars are quick to compile and slow to follow: nested
counts, such as `(a{1000}){1000}`, take a second a step, in which nobody gets a token. One that
takes more than MAX_MASK_S is refused, or fails where it comes to that.

Invariant: a GrammarState follows the output tokens of one request, each exactly once; only it is
changed by them, never its prototype.

Not here: what a client may ask for (structured_api.py), formats of tool calls (tool_calls.py).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, grammar_from

from roost_engine.api_body import invalid
from roost_engine.structured_api import JSON_WHITESPACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from roost_engine.structured_api import GrammarSpec
    from roost_engine.tokenizer import Tokenizer

#: Compiled grammars that are kept, least recently used first to go.
MAX_COMPILED: Final = 128

#: CPU seconds that one mask may take, fifty times what a large schema's first one takes.
MAX_MASK_S: Final = 0.25

# An error names the fault first; what follows is the grammar again.
_MAX_ERROR_CHARACTERS: Final = 300


class GrammarState:
    """How far one request's output has come in its grammar. Engine thread only."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.failure: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow what came so far."""
        return self.failure is None and self._matcher.is_stopped()

    def fresh_copy(self) -> GrammarState:
        """Another one at the same place."""
        return GrammarState(self._matcher.deep_copy())

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take in output tokens, in order."""
        if token_ids and not self._matcher.consume_tokens(list(token_ids)):
            self._note_failure()

    def allowed(self, vocab_size: int) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, (vocab_size,); end-of-sequence where the output may end."""
        started_s = time.thread_time()
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self._note_failure()
        elif time.thread_time() - started_s > MAX_MASK_S:
            self.failure = "the grammar is too complex to be followed from here"
        allowed = np.zeros(vocab_size, dtype=np.bool_)
        bits = np.unpackbits(mask, count=min(vocab_size, mask.size * 8), bitorder="little")
        allowed[: bits.size] = bits
        return allowed

    def _note_failure(self) -> None:
        reason = _first_lines(self._matcher.get_error())
        self.failure = f"the output cannot follow its grammar any further: {reason}"


class GrammarCompiler:
    """Compiles specs for one tokenizer and keeps the results. Any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: LLTokenizer | None = None  # made when first used: 0.2 s
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def try_cached(self, spec: GrammarSpec) -> GrammarState | None:
        """The start of a grammar that is compiled already; does not wait for other threads."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._cached(spec)
        finally:
            self._lock.release()

    def compile(self, spec: GrammarSpec) -> GrammarState:
        """The start of a grammar. ApiError 400 that names the fault if it is none. Blocks."""
        with self._lock:
            state = self._cached(spec)
            if state is not None:
                return state
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
            matcher = _compile(self._vocabulary, spec)
            state = GrammarState(matcher.deep_copy())
            state.allowed(self._tokenizer.vocab_size)
            if state.failure is not None:
                raise _bad_grammar(spec, state.failure)
            self._compiled[spec] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return GrammarState(matcher.deep_copy())

    def _cached(self, spec: GrammarSpec) -> GrammarState | None:
        matcher = self._compiled.get(spec)
        if matcher is None:
            return None
        self._compiled.move_to_end(spec)
        return GrammarState(matcher.deep_copy())


def _compile(vocabulary: LLTokenizer, spec: GrammarSpec) -> LLMatcher:
    try:
        if spec.kind == "json_schema":
            text = LLMatcher.grammar_from_json_schema(
                spec.text, overrides={"whitespace_pattern": JSON_WHITESPACE}
            )
        else:
            text = grammar_from(spec.kind, spec.text)
    except ValueError as error:
        raise _bad_grammar(spec, str(error)) from None
    matcher = LLMatcher(vocabulary, text, log_level=0)
    if matcher.is_error():
        raise _bad_grammar(spec, matcher.get_error())
    return matcher


def _bad_grammar(spec: GrammarSpec, problem: str) -> Exception:
    return invalid(spec.param, f"{spec.param!r} cannot be enforced: {_first_lines(problem)}")


def _first_lines(problem: str) -> str:
    return problem.strip()[:_MAX_ERROR_CHARACTERS]


class _Vocabulary:
    """Our tokenizer as llguidance wants to see one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = None
        ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.spelled_bytes(token_id) for token_id in ids]
        self.special_token_ids = [
            token_id for token_id in ids if tokenizer.token_bytes(token_id) != self.tokens[token_id]
        ]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode())


def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=sorted(tokenizer.eos_token_ids)
    )
