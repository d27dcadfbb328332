r"""Segments: texts cut where their tokens are cut, whatever comes before and after. Pure.

    "<|im_start|>system\nYou are ... |<|im_start|>user\nWhat is | the capital of ..."

At a *safe boundary* the tokens of a text are those of the text before it and those of the text
after it, each encoded alone. So segments can be encoded once and remembered, which makes a prompt
that extends or shares one seen lately cost only what is new; and all tokens before a boundary that
a text shows are certain for every text that begins alike.

Safe are

- the beginning of a special token: text is cut there before anything else is done to it;
- for tokenizers that cut text into words first and know no state between them (byte-level BPE):
  between a single newline and a letter, and between a letter or comma and a single space with a
  letter after it. (Of more blanks, the last often goes with the word: what follows decides.)
  `Encoder` tries this at its start on a text made for it, and does without if it fails.

The cut is greedy from the left, at the first boundary after `MIN_CHARACTERS`: it depends on what
is to the left of it only, so texts that begin alike are cut alike.

Not here: tokenizers (tokenizer_folder.py), what the text is (prompt_text.py).
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

MIN_CHARACTERS: Final = 128
#: Characters and tokens of segments that are remembered, a character and a token counted alike.
_MAX_REMEMBERED: Final = 16 << 20
_BETWEEN_WORDS: Final = re.compile(r"(?<=\S)\n(?=[A-Za-z])|(?<=[A-Za-z,])(?= [A-Za-z])")
_TRIAL: Final = "\n".join(
    f"Word{blank}and, more{blank}it's 12345{blank}x,{blank} y\n{blank}\nline{blank}\n\nNext{blank}"
    f"é, ß,{blank}ok-ok_ok a.b c() {{\n{blank}foo = bar, baz\n}}\nend{blank} of 日本, it"
    for blank in (" ", "  ", "\t", " \t ", "\r\n", "")
)


class Boundary(NamedTuple):
    """A place in a text where segments meet."""

    known_at: int  # characters that show that it is one
    num_tokens: int  # before it


class Encoded(NamedTuple):
    """Tokens of a text."""

    token_ids: array[int]  # u32
    boundaries: list[Boundary]  # ascending


class Encoder:
    """Encodes texts segment by segment."""

    def __init__(
        self,
        encode: Callable[[list[str]], list[list[int]]],
        special_tokens: Iterable[str],
        other_tokens: Iterable[str] = (),
        *,
        cuts_words: bool,
    ) -> None:
        """`encode`: token ids of each text, nothing added in front or behind.

        `special_tokens`: those at whose beginning a text may be cut; `other_tokens`: further ones
        that are looked for in a text before it is cut into words. `cuts_words`: try whether it
        may be cut between words as well.
        """
        self._encode = encode
        self._special = frozenset(special_tokens)
        tokens = sorted({*self._special, *other_tokens}, key=len, reverse=True)  # longest first
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._known: OrderedDict[str, array[int]] = OrderedDict()  # least recently used first
        self._num_remembered = 0
        self.cuts_words = cuts_words
        # Half of a token that looks like words would be taken for them.
        if cuts_words and any(_BETWEEN_WORDS.search("a" + token) for token in tokens):
            self.cuts_words = False
        elif cuts_words:
            self.cuts_words = self._passes_trial()

    def encode(self, text: str) -> Encoded:
        """Token ids of `text`, and where segments meet. O(characters that are new)."""
        cuts = self._cuts(text, MIN_CHARACTERS)
        ends = [0, *(cut for cut, _ in cuts), len(text)]
        segments = [text[start:end] for start, end in pairwise(ends)]
        tokens, boundaries = array("I"), []
        parts = self._encode_segments(segments)
        for number, part in enumerate(parts):
            tokens += part
            if number < len(cuts):
                boundaries.append(Boundary(cuts[number][1], len(tokens)))
        return Encoded(tokens, boundaries)

    def _cuts(self, text: str, least: int) -> list[tuple[int, int]]:
        """(where to cut, characters that show that one may)."""
        cuts: list[tuple[int, int]] = []
        last = at = 0  # the last cut; where to look on
        for token in self._tokens.finditer(text):
            start, end = token.span()
            last = self._cut_words(text, at, start, last, least, cuts)
            if token[0] in self._special and start - last >= least:
                cuts.append((start, end))
                last = start
            at = end
        self._cut_words(text, at, len(text), last, least, cuts)
        return cuts

    def _cut_words(  # noqa: PLR0917
        self, text: str, at: int, end: int, last: int, least: int, cuts: list[tuple[int, int]]
    ) -> int:
        """Add cuts between the words of text[at:end]; the last cut, which was at `last`."""
        while self.cuts_words:
            found = _BETWEEN_WORDS.search(text, max(at, last + least), end)
            if found is None:
                break
            last = found.end()
            # A letter behind the newline shows it, or a space and a letter behind the word.
            cuts.append((last, last + (1 if found[0] else 2)))
        return last

    def _encode_segments(self, segments: Sequence[str]) -> list[array[int]]:
        missing = list(dict.fromkeys(s for s in segments if s not in self._known))
        new = dict(zip(missing, map(_packed, self._encode(missing)), strict=True))
        parts: list[array[int]] = []
        for segment in segments:
            part = self._known.get(segment)
            if part is None:
                part = self._known[segment] = new[segment]
                self._num_remembered += len(segment) + len(part)
            self._known.move_to_end(segment)
            parts.append(part)
        while self._num_remembered > _MAX_REMEMBERED:
            segment, part = self._known.popitem(last=False)
            self._num_remembered -= len(segment) + len(part)
        return parts

    def _passes_trial(self) -> bool:
        cuts = [0, *(cut for cut, _ in self._cuts(_TRIAL, 1)), len(_TRIAL)]
        parts = self._encode([_TRIAL[start:end] for start, end in pairwise(cuts)])
        [whole] = self._encode([_TRIAL])
        return whole == [token for part in parts for token in part]


def _packed(token_ids: list[int]) -> array[int]:
    return array("I", token_ids)
