"""`roost doctor`: where a router loses cache hits, what ails its replicas, and the cure of each."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roost.admin_client import ask_fleet, asks_admin, printable, read_key
from roost.text_table import duration, percent, shadow_text

if TYPE_CHECKING:
    from roost_router.findings import Finding
    from roost_router.fleet_page import FleetPage
    from roost_router.rungs import ModelLadder, Rung

#: A loss below needs no cure.
_MIN_LOSS = 0.01
_COLORS = {"error": "red", "warning": "yellow", "note": None}


@click.command()
@asks_admin("each is looked at")
def doctor(admins: tuple[str, ...], admin_key_file: Path | None) -> None:
    """Show where cache hits are lost and what is wrong with replicas, each with its cure.

    The exit status is 1 if there is a finding of severity "error", else 0.
    """
    key = read_key(admin_key_file)
    has_errors = False
    for admin in admins:
        page = ask_fleet(admin, key)
        for line in _lines(page, admin):
            click.echo(line)
        has_errors |= any(finding.severity == "error" for finding in page.findings)
    if has_errors:
        raise SystemExit(1)


def _lines(page: FleetPage, admin: str) -> Iterator[str]:
    up = f"{page.totals.replicas_up} of {page.totals.replicas} replicas up"
    yield f"roost {page.version} at {admin}: up {duration(page.uptime_s)}, {up}"
    if not page.ladders:
        yield ""
        yield "No request has been computed yet: there is no hit ladder."
    for ladder in page.ladders:
        yield ""
        yield from _ladder_lines(ladder, page.rungs)
    if page.shadow is not None:
        yield ""
        yield shadow_text(page.shadow)
    yield ""
    if not page.findings:
        yield "No findings on replicas."
    for finding in page.findings:
        yield from _finding_lines(finding)


def _ladder_lines(ladder: ModelLadder, rungs: tuple[Rung, ...]) -> Iterator[str]:
    span, shown = "last 10 minutes", ladder.recent
    if not shown.num_requests:
        span, shown = "since the start", ladder.since_start
    yield (
        f"{printable(ladder.model)}, {span}: {shown.num_requests:,} requests, "
        f"{shown.prompt_tokens:,} prompt tokens, of which were or would be cached:"
    )
    for rung, share, lost in zip(rungs, shown.shares, shown.lost, strict=True):
        yield f"  {rung.name:14}  {percent(share):>7}"
        if lost is not None and lost >= _MIN_LOSS:
            yield from _wrapped(f"lost {percent(lost)}: {rung.loss}", 6)
            if rung.cure:
                yield from _wrapped(f"cure: {rung.cure}", 6)
    if shown.shares[-1] is None:
        yield from _wrapped("not told: no replica reported cached_tokens", 6)
    elif shown.told_share < 1 - _MIN_LOSS:
        yield from _wrapped(
            f"the last rung is of the {percent(shown.told_share)} of prompt tokens whose answers "
            "told cached_tokens",
            6,
        )
    if shown.doubled is not None and shown.doubled - (shown.shares[1] or 0.0) >= _MIN_LOSS:
        yield f"  Capacity-bound with twice the KV memory: {percent(shown.doubled)}."
    if ladder.sampled_share < 1:
        one_in = round(1 / ladder.sampled_share)
        yield f"  The first two rungs are estimated from one block in {one_in:,}."


def _finding_lines(finding: Finding) -> Iterator[str]:
    severity = click.style(f"{finding.severity:8}", _COLORS[finding.severity])
    whose = finding.replica or "fleet"
    yield f"{severity} {whose}: {printable(finding.what)}"
    yield from _wrapped(f"cure: {printable(finding.cure)}", 9)


def _wrapped(text: str, indent: int) -> list[str]:
    width = max(40, min(100, shutil.get_terminal_size().columns))
    margin = " " * indent
    return textwrap.wrap(text, width, initial_indent=margin, subsequent_indent=margin)
