"""`roost explain`: a receipt out of a router's admin port, or a dry run there, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import quote

import click

from roost.admin_client import ask, asks_admin, check_status, message, printable, read_key
from roost.text_table import table

if TYPE_CHECKING:
    from roost_router.explanation import Attempt, CandidateRow, DryRun, Explanation, RunnerUp

Shown = TypeVar("Shown")

#: Candidates shown of each attempt; --json has all.
_MAX_ROWS = 10


@click.command()
@click.argument("request_id", metavar="ID", required=False)
@click.option(
    "--dry-run",
    "body",
    type=click.File("rb"),
    metavar="FILE",
    help="Instead of ID, a request's JSON body (- for standard input): where would it go now? It "
    "is sent nowhere.",
)
@asks_admin("the one that served it knows")
@click.option("--json", "as_json", is_flag=True, help="Print what the router says, as it says it.")
def explain(
    request_id: str | None,
    body: BinaryIO | None,
    admins: tuple[str, ...],
    admin_key_file: Path | None,
    as_json: bool,
) -> None:
    """Show why a request went where it went, and what came of it.

    ID is the x-request-id of its answer. The router keeps the last 100,000.

    Example: roost explain req-0123456789abcdef0123456789abcdef
    """
    from roost_router.explanation import DryRun, Explanation

    key = read_key(admin_key_file)
    if (request_id is None) is (body is None):
        raise click.UsageError("give the ID of a request, or a request with --dry-run")
    if body is not None:
        page = _ask_each(admins, "/explain", key, body.read())
        lines = partial(_show, page, DryRun, _dry_run_lines)
    else:
        page = _ask_each(admins, f"/explain/{quote(request_id or '', safe='')}", key)
        lines = partial(_show, page, Explanation, _lines)
    if as_json:
        click.echo(page)
    else:
        lines()


def _show(page: bytes, kind: type[Shown], lines: Callable[[Shown], Iterator[str]]) -> None:
    import msgspec

    try:
        found = msgspec.json.decode(page, type=kind)
    except msgspec.DecodeError as error:
        raise click.ClickException(f"that is not a router of this version: {error}") from None
    for line in lines(found):
        click.echo(line)


def _ask_each(
    admins: tuple[str, ...], path: str, key: str | None, body: bytes | None = None
) -> bytes:
    """The first page that one of the admin ports has. Raises click.ClickException."""
    said = ""
    for admin in admins:
        status, page = ask(admin, path, key, body=body)
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


def _dry_run_lines(found: DryRun) -> Iterator[str]:
    yield (
        f"model {printable(found.model)}, a prompt of {found.prompt_bytes:,} bytes, some "
        f"{found.prompt_tokens:,} tokens"
    )
    yield f"it would go to {found.replica}{_beside(found.runner_up)}"
    yield from _candidate_lines(found.candidates, found.replica)


def _attempt_lines(number: int, attempt: Attempt) -> Iterator[str]:
    beside = _beside(attempt.runner_up)
    yield f"attempt {number} after {_seconds(attempt.at_s)}: {attempt.replica}{beside}"
    yield from _candidate_lines(attempt.candidates, attempt.replica)
    yield f"  expected {_seconds(attempt.predicted_prefill_s)} of queue and prefill"
    if attempt.lost is not None:
        yield f"  loss: {attempt.lost}, then {attempt.then}"


def _beside(second: RunnerUp | None) -> str:
    return f"; next best {second.replica}, {_seconds(second.behind_s)} behind" if second else ""


def _candidate_lines(candidates: list[CandidateRow], chosen: str) -> Iterator[str]:
    rows = [("", "replica", "cost", "matched", "known by", "uncached", "queued", "decoding")]
    best_first = sorted(candidates, key=_cost_s)
    best_first.sort(key=lambda row: row.replica != chosen)
    rows += [
        (
            "*" if row.replica == chosen else "",
            row.replica,
            _seconds(row.cost_s),
            f"{row.matched_tokens:,}",
            "KV events" if row.is_told else "placements",
            f"{row.uncached_tokens:,}",
            f"{row.queued_tokens:,}",
            f"{row.num_decoding:,}",
        )
        for row in best_first[:_MAX_ROWS]
    ]
    yield from table(rows, "<<>><>>>")
    if len(best_first) > _MAX_ROWS:
        yield f"    and {len(best_first) - _MAX_ROWS} more"


def _cost_s(row: CandidateRow) -> float:
    return inf if row.cost_s is None else row.cost_s


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f} s"
