"""Asks vLLM to tell again which blocks a request reuses, in the request's body. Pure.

vLLM has no snapshot. After events were lost, or for a router that came late, its engine tells the
blocks of a prompt that it reuses as if they were stored now, if the request says so:

    {"vllm_xargs": {"kv_cache_report_mode": "full"}, ...}
"""

from __future__ import annotations

from typing import Final

_FIELD: Final = b'"vllm_xargs":{"kv_cache_report_mode":"full"},'


def ask_for_reuse(path: bytes, body: bytes) -> bytes:
    """`body`, a JSON object with fields, with the wish; as it is if it has such arguments itself.

    Only chats and completions have them, and leave blocks in the cache. O(bytes).
    """
    start = body.find(b"{") + 1
    if not start or b'"vllm_xargs"' in body or not path.endswith(b"/completions"):
        return body
    return body[:start] + _FIELD + body[start:]
