"""What a router found when it started: each replica, what is missing there, and what adds it. Pure.

`roost route` prints it. Later, `roost doctor` tells the same, and what requests have shown since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from roost_router.answer.resume import EXACT_DIALECT, TEXT_DIALECTS
from roost_router.findings import Finding, events_cure

if TYPE_CHECKING:
    from roost_router.fleet_page import FleetPage, ReplicaRow
    from roost_router.kv.source import KvSource


class StartRow(msgspec.Struct):
    """One replica."""

    name: str
    url: str
    server: str  # vllm, sglang and so on, by its own words; "" where it does not say
    models: tuple[str, ...]
    kv_tokens: int | None
    block_tokens: int | None  # of its KV cache, as far as its events tell
    tells_load: bool  # its queue and KV use
    kv_events: str  # followed, published, none, unknown
    continues: str  # a stream that another replica lost: exactly, by text, completions


class StartPage(msgspec.Struct):
    """All of them."""

    rows: list[StartRow]
    findings: list[Finding]


def start_page(
    page: FleetPage, sources: Mapping[str, list[KvSource] | None], *, follows_events: bool
) -> StartPage:
    """The page. `sources`: streams of KV events by replica; None: it could not be asked."""
    rows = [_row(row, sources.get(row.name), follows_events) for row in page.replicas]
    missing = [finding for row in page.replicas for finding in _missing(row, rows, follows_events)]
    return StartPage(rows, [*page.findings, *missing])


def _row(row: ReplicaRow, sources: list[KvSource] | None, follows_events: bool) -> StartRow:
    found = "followed" if follows_events else "published"
    if not sources:
        found = "unknown" if sources is None else "none"
    sizes = [source.block_size for source in sources or () if source.block_size is not None]
    return StartRow(
        row.name,
        row.url,
        row.dialect,
        row.models,
        row.kv_capacity_tokens,
        sizes[0] if sizes else None,
        row.reported.num_running is not None,
        found,
        _continues(row.dialect),
    )


def _continues(dialect: str) -> str:
    if dialect == EXACT_DIALECT:
        return "exactly"
    return "by text" if dialect in TEXT_DIALECTS else "completions"


def _missing(row: ReplicaRow, rows: list[StartRow], follows_events: bool) -> list[Finding]:
    """What /fleet does not find: KV events, which nobody asked for yet."""
    (found,) = [start.kv_events for start in rows if start.name == row.name]
    if row.state != "up" or follows_events or found == "unknown":
        return []
    if found == "published":
        what, model = "publishes KV events that are not followed", "".join(row.models[:1])
        cure = f"pass --tokenizer {model}=FOLDER, with its tokenizer.json and chat template"
    else:
        what, cure = "publishes no KV events: what it evicts is guessed", events_cure(row.dialect)
    return [Finding("note", row.name, what, cure)]
