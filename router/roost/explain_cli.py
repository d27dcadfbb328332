"""`roost explain`: asks a router's admin port for a receipt and prints it as a table."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from roost.admin_client import ask, asks_admin, check_status, message, printable, read_key
from roost.text_table import table

if TYPE_CHECKING:
    from roost_router.explanation import Attempt, CandidateRow, Explanation

#: Candidates shown of each attempt; --json has all.
_MAX_ROWS = 10


@click.command()
@click.argument("request_id", metavar="ID")
@asks_admin("the one that served it knows")
@click.option("--json", "as_json", is_flag=True, help="Print what the router says, as it says it.")
def explain(
    request_id: str, admins: tuple[str, ...], admin_key_file: Path | None, as_json: bool
) -> None:
    """Show why a request went where it went, and what came of it.

    ID is the x-request-id of its answer. The router keeps the last 100,000.

    Example: roost explain req-0123456789abcdef0123456789abcdef
    """
    import msgspec

    from roost_router.explanation import Explanation

    key = read_key(admin_key_file)
    page = _ask_each(admins, f"/explain/{quote(request_id, safe='')}", key)
    if as_json:
        click.echo(page)
        return
    try:
        found = msgspec.json.decode(page, type=Explanation)
    except msgspec.DecodeError as error:
        raise click.ClickException(f"that is not a router of this version: {error}") from None
    for line in _lines(found):
        click.echo(line)


def _ask_each(admins: tuple[str, ...], path: str, key: str | None) -> bytes:
    """The first page that one of the admin ports has. Raises click.ClickException."""
    said = ""
    for admin in admins:
        status, page = ask(admin, path, key)
        if status == 200:
            return page
        if status != 404:
            check_status(admin, status, page)
        said = message(page)
    raise click.ClickException(said)


def _lines(found: Explanation) -> Iterator[str]:
    error = f" ({found.error})" if found.error else ""
    yield f"{printable(found.id)}  {found.at}  model {printable(found.model)}"
    yield f"{found.outcome}, status {found.status}{error}, after {_seconds(found.duration_s)}"
    if found.ttft_s is not None:
        yield f"first token after {_seconds(found.ttft_s)}"
    if found.prompt_tokens is not None:
        cached = "not told" if found.cached_tokens is None else f"{found.cached_tokens:,}"
        yield f"prompt {found.prompt_tokens:,} tokens, from cache: {cached}"
    for number, attempt in enumerate(found.attempts, 1):
        yield ""
        yield from _attempt_lines(number, attempt)


def _attempt_lines(number: int, attempt: Attempt) -> Iterator[str]:
    second = attempt.runner_up
    beside = f"; next best {second.replica}, {_seconds(second.behind_s)} behind" if second else ""
    yield f"attempt {number} after {_seconds(attempt.at_s)}: {attempt.replica}{beside}"
    rows = [("", "replica", "cost", "matched", "uncached", "queued", "decoding")]
    best_first = sorted(attempt.candidates, key=_cost_s)
    best_first.sort(key=lambda row: row.replica != attempt.replica)
    rows += [
        (
            "*" if row.replica == attempt.replica else "",
            row.replica,
            _seconds(row.cost_s),
            f"{row.matched_tokens:,}",
            f"{row.uncached_tokens:,}",
            f"{row.queued_tokens:,}",
            f"{row.num_decoding:,}",
        )
        for row in best_first[:_MAX_ROWS]
    ]
    yield from table(rows, "<<>>>>>")
    if len(best_first) > _MAX_ROWS:
        yield f"    and {len(best_first) - _MAX_ROWS} more"
    yield f"  expected {_seconds(attempt.predicted_prefill_s)} of queue and prefill"
    if attempt.lost is not None:
        yield f"  loss: {attempt.lost}, then {attempt.then}"


def _cost_s(row: CandidateRow) -> float:
    return inf if row.cost_s is None else row.cost_s


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f} s"
