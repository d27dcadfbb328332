"""What llama.cpp's server says of itself at /props, beside its metrics. Pure.

It answers as many requests at once as it has slots; the others wait in it, first come first served.
How much KV it keeps is not told: beside the slots there is a cache in the host's memory
(--cache-ram). Source: llama.cpp's tools/server/README.md.
"""

import msgspec

#: Its `owned_by` in /v1/models.
LLAMA_CPP = "llamacpp"
PROPS_PATH = b"/props"
_MAX_SLOTS = 1 << 16


class _Props(msgspec.Struct):
    total_slots: int = 0


_decoder = msgspec.json.Decoder(_Props)


def num_slots(page: bytes) -> int | None:
    """Requests that it answers at once, by its /props; None where that is not told."""
    try:
        slots = _decoder.decode(page).total_slots
    except (ValueError, RecursionError):  # msgspec's errors and Unicode's are ValueErrors
        return None
    return slots if 0 < slots <= _MAX_SLOTS else None
