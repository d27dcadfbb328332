"""What a router found when it started: each replica, what is missing there, and what adds it. Pure.

`roost route` prints it. Later, `roost doctor` tells the same, and what requests have shown since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from roost_router.answer.resume import EXACT_DIALECT, TEXT_DIALECTS
from roost_router.findings import Finding, no_kv_events

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
    findings = list(page.findings)
    for row, found in zip(page.replicas, rows, strict=True):
        # What /fleet does not find, since nobody asked for it yet.
        if row.state == "up" and found.kv_events == "published":
            findings.append(_not_followed(row))
        elif row.state == "up" and found.kv_events == "none" and not follows_events:
            findings.append(no_kv_events(row))
        elif found.kv_events == "followed" and no_kv_events(row) in findings:
            findings.remove(no_kv_events(row))  # the follower has not asked yet
    return StartPage(rows, findings)


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


def _not_followed(row: ReplicaRow) -> Finding:
    model = "".join(row.models[:1])
    cure = f"pass --tokenizer {model}=FOLDER, with its tokenizer.json and chat template"
    return Finding("note", row.name, "publishes KV events that are not followed", cure)
