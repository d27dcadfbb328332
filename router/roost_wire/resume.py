"""Resuming a stream on another replica: what a router is told, and what it sends. PURE.

A router that relays a stream asks for what it needs to continue it elsewhere, with the request
header `x-roost-resumable: 1`. The replica's head then carries `x-roost-seed`, the seed that
tokens are really drawn with, and every event is preceded, in its own block, by one comment with
all tokens generated since the last comment, also those whose text is not shown yet (the beginning
of a stop string, half a character):

    : roost 12 345 6
    data: {"id":"chatcmpl-...", ...}

SSE ignores comments, so a client that sees one is not harmed; the router strips them. To resume,
the same body goes to another replica with one more top-level field:

    "roost_resume": {"token_ids": [12, 345, 6], "seed": 9041}

That replica continues as if it had generated these tokens itself. For a stream with one choice
only; `token_ids` may be empty, which starts over with the seed given.

Invariant: `read_comment(comment(ids)) == ids`, and `with_resume` leaves all bytes of the body as
they are, those around the new field.

Not here: who resumes and when (the router), continuing (the engine).
"""

import re
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

#: Request header: "1" asks for comments with token ids. Any other value does not.
RESUMABLE: Final = "x-roost-resumable"
#: Answer header: the seed of the only choice, decimal.
SEED: Final = "x-roost-seed"
#: Top-level field of a body that continues an answer.
FIELD: Final = "roost_resume"

#: What the line of a comment with token ids begins with.
COMMENT_PREFIX: Final = b": roost "

MAX_TOKEN_ID: Final = 2**31 - 1

_COMMENT: Final = re.compile(rb": roost \d{1,10}(?: \d{1,10})*")
_SPACE: Final = b" \t\r\n"

TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of FIELD: what was generated so far, in order, and the seed it was drawn with."""

    token_ids: list[TokenId]
    seed: Seed


def comment(token_ids: Sequence[int]) -> bytes:
    """The line that reports tokens, with its line feed; nothing for no tokens. O(tokens)."""
    if not token_ids:
        return b""
    return COMMENT_PREFIX + " ".join(map(str, token_ids)).encode() + b"\n"


def read_comment(line: bytes) -> list[int]:
    """Token ids of a line that begins with COMMENT_PREFIX, with or without its line end.

    ValueError if it is anything but what `comment` writes: whoever counts on the ids must not
    resume from half of them. O(line).
    """
    text = line.rstrip(b"\r\n")
    if not _COMMENT.fullmatch(text):
        raise ValueError(f"not a comment with token ids: {line[:80]!r}")
    token_ids = [int(digits) for digits in text[len(COMMENT_PREFIX) :].split(b" ")]
    if max(token_ids) > MAX_TOKEN_ID:
        raise ValueError(f"token id {max(token_ids)} exceeds {MAX_TOKEN_ID}")
    return token_ids


def with_resume(body: bytes, resume: Resume) -> bytes:
    """The body with FIELD as its last member, all else byte for byte. O(body) copying.

    `body` is a JSON object that was parsed before (ValueError if it does not even look like one).
    Should it have the field already, JSON's last member wins, which is the new one.
    """
    text = body.rstrip(_SPACE)
    if not (text.endswith(b"}") and text.lstrip(_SPACE).startswith(b"{")):
        raise ValueError("the body is not a JSON object")
    before = text[:-1].rstrip(_SPACE)
    comma = b"" if before.endswith(b"{") and not before[:-1].strip(_SPACE) else b","
    return before + comma + b'"' + FIELD.encode() + b'":' + msgspec.json.encode(resume) + b"}"
