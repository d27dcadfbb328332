"""What a replica of ours has to do, told without being asked. PURE.

    x-roost-load: [3,1,1296,2048,512]       with the head of each answer to a generation request
    "roost_load": [3, 1, 1296, 2048, 512]   with a batch of KV events: kv_dialects/vllm_encoder.py

The numbers are those of SGLang's LoadStat and /v1/loads, in its order as far as it has them:
num_running_reqs, num_waiting_reqs, num_used_tokens, max_total_num_tokens, and in place of
num_waiting_uncached_tokens what is left to compute of prompts, of requests that wait what was not
cached when they came. More numbers may follow: readers pass over what they do not know.

Invariant: `read_header(load.header())` is `load` again.

Not here: what is read from pages of metrics (load_report.py).
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

#: More is nonsense, and would end up in decisions.
MAX_COUNT: Final = 1 << 40
#: Bounds what a reader passes over.
_MAX_BYTES: Final = 256

_Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]


class ToldLoad(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One replica at one moment. A request runs while it holds blocks of KV memory, else it waits.

    Used are blocks that requests hold. What only the prefix cache holds is free.
    """

    num_running: _Count
    num_waiting: _Count
    used_tokens: _Count
    capacity_tokens: _Count
    queued_tokens: _Count

    def header(self) -> str:
        """The value of headers.LOAD."""
        return msgspec.json.encode(self).decode()


_json_decoder = msgspec.json.Decoder(ToldLoad)
_msgpack_decoder = msgspec.msgpack.Decoder(ToldLoad)


def read_header(value: bytes) -> ToldLoad | None:
    """What `header` wrote; None for anything else. O(1): 0.3 µs."""
    return _read(_json_decoder, value)


def read_packed(value: bytes) -> ToldLoad | None:
    """The same in msgpack."""
    return _read(_msgpack_decoder, value)


def _read(
    decoder: msgspec.json.Decoder[ToldLoad] | msgspec.msgpack.Decoder[ToldLoad], value: bytes
) -> ToldLoad | None:
    if len(value) > _MAX_BYTES:
        return None
    try:
        return decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
