"""What a client sees of one choice: tokens in, pieces of the answer out. PURE.

    tokens --detokenise--> text --stop strings--> text to show --tool parser--> content, calls

Log probabilities follow the text: a token is told of once the first of its characters is shown,
so what stop strings hold back or cut away is not told of. The token that ends an answer is not
part of it.

The last piece holds why the answer ended and what is shown only because it has: text held back as
the possible beginning of a stop string, half a character, what was no tool call after all. What
all pieces before it hold is shown whatever comes next, a function of the tokens so far.

Therefore an answer can be continued from its tokens. `replay` takes those that were generated
elsewhere, and nothing of them is shown again. The last few may have to go through the engine once
more: those whose log probabilities are still to be told, and the very last one if the answer ends
with it or a grammar watches, so that the end comes the way it always comes. `read` takes nothing
of them but their log probabilities.

Invariants: what pieces say, joined, does not depend on how tokens are cut into deltas; `read`
after `replay(ids)` gives what it would give after `read` of the same tokens.

Not here: where tokens come from and who waits for them (generation.py), JSON (responses.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from roost_engine.logprobs_json import ShownToken
from roost_engine.request import FinishReason
from roost_engine.responses import Piece
from roost_engine.text_stream import TextStream
from roost_engine.tokenizer import Detokenizer
from roost_engine.tool_parser import ToolDelta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.chat_api import ToolUse
    from roost_engine.request import SamplingParams, TokenLogprobs
    from roost_engine.token_stream import Delta
    from roost_engine.tokenizer import Tokenizer
    from roost_engine.tool_parser import Parsed, ToolParser


class _Hidden(msgspec.Struct):
    """A token that is not told of yet."""

    token_id: int
    text_offset: int  # characters of the answer before it
    logprobs: TokenLogprobs | None  # None: replayed, the engine still owes them


class Transcript:
    """One answer: `replay` once, if it began elsewhere, then `read` every delta."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        tools: tuple[ToolUse, ToolParser] | None = None,
    ) -> None:
        # The tags around tool calls are special tokens in some models.
        skips_special = sampling.skip_special_tokens and tools is None
        self.num_completion_tokens = 0
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skips_special)
        self._text = TextStream(sampling.stop, shows_stop=sampling.include_stop_in_output)
        self._use: ToolUse | None = None
        self._parser: ToolParser | None = None
        if tools is not None:
            self._use, self._parser = tools
        self._has_calls = False
        self._num_received = self._num_shown = 0  # characters
        self._hidden: deque[_Hidden] = deque()
        self._num_owed = 0  # replayed tokens that come once more
        # Since the last piece, and since `take_ids`:
        self._content = ""
        self._deltas: list[ToolDelta] = []
        self._new_ids: list[int] = []

    def take_ids(self) -> list[int]:
        """Tokens of the answer that were read since the last call."""
        ids, self._new_ids = self._new_ids, []
        return ids

    def replay(self, token_ids: Sequence[int], *, has_grammar: bool) -> int:
        """Take over the beginning of the answer; how many of its last tokens the engine owes.

        ValueError if the answer would have ended before the last of them. O(tokens), some
        microseconds each.
        """
        sampling = self._sampling
        has_ended = is_end = False
        for token_id in token_ids:
            if has_ended:
                raise ValueError(f"the answer ends after {self.num_completion_tokens} of them")
            self.num_completion_tokens += 1
            is_full = self.num_completion_tokens >= sampling.max_tokens
            # What stop tokens would end, the limit has ended before; see core.py.
            is_end = self._is_eos(token_id) or (not is_full and token_id in sampling.stop_token_ids)
            self._take(token_id, None, is_end=is_end)
            has_ended = is_end or is_full or self._is_cut
        self._take_piece()
        num_owed = len(self._hidden)
        if num_owed and is_end and not sampling.include_stop_in_output:
            num_owed += 1  # the last token, which is not told of
        if token_ids and (has_ended or has_grammar):
            num_owed = max(num_owed, 1)
        self._num_owed = num_owed
        return num_owed

    def read(self, delta: Delta) -> list[Piece]:
        """What the next tokens add: a piece, maybe an empty one, and the last piece at the end.

        The answer is over with that, though the engine may not know.
        """
        reason, stop_reason = delta.finish_reason, None
        for index, token_id in enumerate(delta.token_ids):
            is_last = reason is FinishReason.STOP and index == len(delta.token_ids) - 1
            is_stop_token = is_last and token_id in self._sampling.stop_token_ids
            stop_reason = token_id if is_stop_token else None
            logprobs = delta.logprobs[index] if delta.logprobs else None
            if self._num_owed:
                self._settle(logprobs)
            else:
                self.num_completion_tokens += 1
                self._new_ids.append(token_id)
                is_end = is_stop_token or (is_last and self._is_eos(token_id))
                self._take(token_id, logprobs, is_end=is_end)
            if self._is_cut:
                return self._end(FinishReason.STOP, None)
        return [self._take_piece()] if reason is None else self._end(reason, stop_reason)

    @property
    def _is_cut(self) -> bool:
        """Whether the answer has ended by what it says: a stop string, or the last call wanted."""
        return self._text.stopped or (self._parser is not None and self._parser.is_done)

    def _is_eos(self, token_id: int) -> bool:
        return token_id in self._tokenizer.eos_token_ids and not self._sampling.ignore_eos

    def _take(self, token_id: int, logprobs: TokenLogprobs | None, *, is_end: bool) -> None:
        if is_end and not self._sampling.include_stop_in_output:
            return
        if self._sampling.logprobs is not None:
            self._hidden.append(_Hidden(token_id, self._num_received, logprobs))
        self._push(self._detokenizer.push(token_id))

    def _settle(self, logprobs: TokenLogprobs | None) -> None:
        """A replayed token has come: its text is known, its log probabilities may not be."""
        self._num_owed -= 1
        for token in self._hidden:
            if token.logprobs is None:
                token.logprobs = logprobs
                return

    def _push(self, text: str) -> None:
        """Text came: show what of it all may be shown."""
        self._num_received += len(text)
        if self.num_completion_tokens <= self._sampling.min_tokens:
            self._show(self._text.push_unchecked(text))
        else:
            self._show(self._text.push(text))

    def _show(self, text: str) -> None:
        self._num_shown += len(text)
        if self._parser is None:
            self._content += text
        elif text:
            self._note(self._parser.push(text))

    def _note(self, parsed: Parsed) -> None:
        self._content += parsed.content
        for new in parsed.deltas:
            self._has_calls = True
            last = self._deltas[-1] if self._deltas else None
            if last is not None and last.index == new.index and new.name is None:
                self._deltas[-1] = ToolDelta(last.index, last.name, last.arguments + new.arguments)
            else:
                self._deltas.append(new)

    def _take_piece(self, *, num_textless: int = 0) -> Piece:
        """What is shown since the last piece.

        `num_textless` 1: tokens without text behind the last character shown are told of too.
        """
        tokens: list[ShownToken] = []
        while self._hidden and self._hidden[0].text_offset < self._num_shown + num_textless:
            tokens += self._tell(self._hidden.popleft())
        piece = Piece(self._content, tuple(self._deltas), tokens)
        self._content, self._deltas = "", []
        return piece

    def _tell(self, token: _Hidden) -> list[ShownToken]:
        if token.logprobs is None:
            return []  # it was told of before this answer came here
        spell = self._tokenizer.spelled_bytes
        top = [(spell(other), logprob) for other, logprob in token.logprobs.top]
        logprob = token.logprobs.logprob
        return [ShownToken(spell(token.token_id), logprob, top, token.text_offset)]

    def _end(self, reason: FinishReason, stop_reason: str | int | None) -> list[Piece]:
        """What was shown so far, if anything, and the last piece."""
        before = self._take_piece()
        if not self._is_cut:
            self._push(self._detokenizer.flush())
        if not self._is_cut:
            self._show(self._text.flush())
        if self._parser is not None:
            self._note(self._parser.flush())
        rest = self._take_piece(num_textless=0 if self._is_cut else 1)
        if self._text.stopped:
            reason, stop_reason = FinishReason.STOP, self._text.matched
        # OpenAI and vLLM say "stop" for a function that was named by the client.
        is_call = self._has_calls and self._use is not None and self._use.choice != "named"
        word = "tool_calls" if is_call and reason is FinishReason.STOP else reason.value
        last = Piece(rest.text, rest.tool_deltas, rest.tokens, word, stop_reason)
        return [before, last] if before.shows_anything else [last]
