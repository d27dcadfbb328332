"""`roost explain`: asks a router's admin port for a receipt and prints it as a table.

Over the standard library's HTTP: no proxy of the environment is used and no redirect followed, so
the key goes to the address given and nowhere else.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import click

from roost.cli_parts import FILE

if TYPE_CHECKING:
    from roost_router.explanation import Attempt, CandidateRow, Explanation

_TIMEOUT_S = 10.0
#: A fleet of 1,024 replicas and four attempts make half a megabyte.
_MAX_PAGE_BYTES = 8 << 20
#: Candidates shown of each attempt; --json has all.
_MAX_ROWS = 10


@click.command()
@click.argument("request_id", metavar="ID")
@click.option(
    "--admin",
    "admins",
    multiple=True,
    default=("http://127.0.0.1:9000",),
    metavar="URL",
    help="Admin port of the router. Repeat for each worker: the one that served it knows.",
)
@click.option("--admin-key-file", type=FILE, help="Holds a key that the admin port asks for.")
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

    key = None if admin_key_file is None else _key(admin_key_file)
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


def _key(path: Path) -> str:
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read a key from {path}: {error}") from None
    if not key or not key.isprintable():
        raise click.ClickException(f"{path} must hold one key, on one line")
    return key


def _ask_each(admins: tuple[str, ...], path: str, key: str | None) -> bytes:
    """The first page that one of the admin ports has. Raises click.ClickException."""
    said = ""
    for admin in admins:
        status, page = _ask(admin, path, key)
        if status == 200:
            return page
        said = _message(page)
        if status == 401:
            raise click.ClickException(f"{admin}: {said}; give it with --admin-key-file")
        if status != 404:
            raise click.ClickException(f"{admin} answered {status}: {said}")
    raise click.ClickException(said)


def _ask(admin: str, path: str, key: str | None) -> tuple[int, bytes]:
    try:
        parts = urlsplit(admin)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.scheme != "http" or parts.path not in {"", "/"} or parts.query:
        raise click.BadParameter(
            f"{admin!r} is no admin port; one looks like http://127.0.0.1:9000",
            param_hint="--admin",
        )
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(_MAX_PAGE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise click.ClickException(
            f"no router answers at {admin}: {error or type(error).__name__}; "
            "--admin takes the URL of its admin port"
        ) from None
    finally:
        connection.close()


def _message(page: bytes) -> str:
    """What an error of a router says."""
    import msgspec

    try:
        return _printable(str(msgspec.json.decode(page)["error"]["message"]))
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "this is not a router's admin port"


def _lines(found: Explanation) -> Iterator[str]:
    error = f" ({found.error})" if found.error else ""
    yield f"{_printable(found.id)}  {found.at}  model {_printable(found.model)}"
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for mark, name, *cells in rows:
        figures = "  ".join(c.rjust(w) for c, w in zip(cells, widths[2:], strict=True))
        yield f"  {mark:1} {name:{widths[1]}}  {figures}"
    if len(best_first) > _MAX_ROWS:
        yield f"    and {len(best_first) - _MAX_ROWS} more"
    yield f"  expected {_seconds(attempt.predicted_prefill_s)} of queue and prefill"
    if attempt.lost is not None:
        yield f"  loss: {attempt.lost}, then {attempt.then}"


def _cost_s(row: CandidateRow) -> float:
    return inf if row.cost_s is None else row.cost_s


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f} s"


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor: ids and models come from clients."""
    return "".join(char if char.isprintable() else "?" for char in text)
