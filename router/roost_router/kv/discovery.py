"""Asks a replica where it publishes KV events. Decides nothing: what pages mean is source.py's."""

from __future__ import annotations

from typing import Final

from roost_router.http.page import get_page
from roost_router.http.upstream import UpstreamPool
from roost_router.kv.source import (
    Dialect,
    KvSource,
    read_kv_event_sources,
    read_server_info,
    read_tokens_per_block,
)

#: `owned_by` of TensorRT-LLM's models. Its events are handed out once, so nobody asks in vain.
_TENSORRT_LLM: Final = "tensorrt_llm"


async def discover(
    pool: UpstreamPool, url: str, owned_by: str, authorization: str | None, timeout_s: float
) -> list[KvSource]:
    """The replica's streams of events; empty if it has none, or does not say.

    `owned_by`: as its /v1/models says, "" if not known. Raises SourceError, PageError (both are
    ValueErrors) and OSError.
    """
    if owned_by == _TENSORRT_LLM:
        page = await get_page(pool, b"/metrics", authorization, timeout_s)
        block_size = read_tokens_per_block(page.body.decode("utf-8", "replace"))
        if block_size is None:
            return []
        return [KvSource(Dialect.TENSORRT_LLM, url, block_size=block_size)]
    page = await get_page(pool, b"/kv_event_sources", authorization, timeout_s)
    if page.status == 200:
        return read_kv_event_sources(page.body, url)
    page = await get_page(pool, b"/server_info", authorization, timeout_s)
    return read_server_info(page.body, url) if page.status == 200 else []
