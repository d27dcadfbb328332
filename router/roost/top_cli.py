"""`roost top`: a router's replicas, live in the terminal.

Plain escape sequences (ECMA-48), not a library: a table of text, whole rows coloured, is all there
is to draw. `rich` would add 13 MB to an install of 20.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from roost.admin_client import NoAnswerError, ask_fleet, asks_admin, printable, read_key
from roost.text_table import duration, percent, seconds, shadow_text, table

if TYPE_CHECKING:
    from roost_router.fleet_page import FleetPage, ReplicaRow
    from roost_router.rungs import ModelLadder, Rung

_INTERVAL_S = 1.0
_TIMEOUT_S = 2.0
_BAR_CHARS = 8
_HEAD = (
    *("replica", "state", "flight", "decode", "queued", "KV in use", "capacity", "known by"),
    *("hit rate", "req/s", "fail/s", "p50 s", "p99 s", "model"),
)
_ALIGN = "<<>>>>><>>>>><"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # other screen, no cursor
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class Line(NamedTuple):
    """One line of the screen."""

    text: str
    color: str | None = None
    bold: bool = False
    dim: bool = False


@click.command()
@asks_admin("they are shown one below the other")
@click.option("--once", is_flag=True, help="Print one table and leave; so it does where piped.")
def top(admins: tuple[str, ...], admin_key_file: Path | None, once: bool) -> None:
    """Show replicas, queues, caches and latencies of a router, live.

    q or Ctrl-C leaves. Figures are of the last minute, the hit ladder of the last ten.
    """
    key = read_key(admin_key_file)
    if once or not sys.stdout.isatty():
        for admin in admins:
            for line in fleet_lines(ask_fleet(admin, key), admin):
                click.echo(line.text)
        return
    views = [_View(admin, key) for admin in admins]
    with suppress(KeyboardInterrupt), _screen() as wait:
        while True:
            for view in views:
                view.look()
            _draw([line for view in views for line in view.lines()])
            if wait(_INTERVAL_S):
                return


class _View:
    """One router: its last page, and since when it does not answer."""

    def __init__(self, admin: str, key: str | None) -> None:
        self._admin = admin
        self._key = key
        self._page: FleetPage | None = None
        self._gone_since: float | None = None
        self._error = ""

    def look(self) -> None:
        """Ask for a page. Raises click.ClickException for what waiting will not mend."""
        try:
            self._page = ask_fleet(self._admin, self._key, _TIMEOUT_S)
        except NoAnswerError as error:
            self._error = error.message
            if self._gone_since is None:
                self._gone_since = time.monotonic()
        else:
            self._gone_since = None

    def lines(self) -> list[Line]:
        """What to show."""
        lines = [] if self._page is None else list(fleet_lines(self._page, self._admin))
        if self._gone_since is None:
            return lines
        gone = duration(time.monotonic() - self._gone_since)
        last = [line._replace(color=None, bold=False, dim=True) for line in lines]
        return [Line(f"gone for {gone}: {self._error}", "red", bold=True), *last]


def fleet_lines(page: FleetPage, admin: str) -> Iterator[Line]:
    """A page as lines of any width."""
    totals, traffic = page.totals, page.totals.traffic
    draining = "DRAINING, " if page.is_draining else ""
    yield Line(
        f"roost {page.version} at {admin}: {draining}up {duration(page.uptime_s)}, "
        f"{totals.replicas_up} of {totals.replicas} replicas up",
        bold=True,
    )
    yield Line(
        f"{traffic.requests_per_s:.1f} requests/s, {traffic.failures_per_s:.1f} failures/s, "
        f"hit rate {percent(traffic.hit_rate)}, TTFT p50 {seconds(traffic.ttft_p50_s)} "
        f"p99 {seconds(traffic.ttft_p99_s)}; {totals.in_flight} in flight, "
        f"{totals.decoding} decoding, {totals.queued_tokens:,} tokens queued, "
        f"{totals.held_requests} held"
    )
    yield Line("")
    head, *rows = table([_HEAD, *(_cells(row) for row in page.replicas)], _ALIGN)
    yield Line(head, bold=True)
    for row, text in zip(page.replicas, rows, strict=True):
        yield Line(text, _color(row))
        if row.ejection is not None:
            yield Line(f"    {printable(row.ejection.reason)}", _color(row))
    for source in page.sources:
        if source.failing_s is not None:
            name, reason = printable(source.name), printable(source.reason)
            yield Line(f"{name} fails since {duration(source.failing_s)}: {reason}", "yellow")
    for ladder in page.ladders:
        yield Line("")
        yield from _ladder_lines(ladder, page.rungs)
    if page.shadow is not None:
        yield Line("")
        yield Line(shadow_text(page.shadow))


def _cells(row: ReplicaRow) -> tuple[str, ...]:
    traffic, report = row.traffic, row.reported
    capacity = "-" if row.kv_capacity_tokens is None else f"{row.kv_capacity_tokens:,}"
    return (
        row.name,
        _state(row),
        str(row.in_flight),
        str(row.decoding),
        f"{row.queued_tokens:,}",
        _bar(report.kv_usage),
        capacity,
        row.known_by,
        percent(traffic.hit_rate),
        f"{traffic.requests_per_s:.1f}",
        f"{traffic.failures_per_s:.1f}",
        _short(traffic.ttft_p50_s),
        _short(traffic.ttft_p99_s),
        printable(", ".join(row.models)),
    )


def _state(row: ReplicaRow) -> str:
    if row.state != "up" or row.ejection is None:
        return row.state
    return f"ejected {row.ejection.left_s:.0f} s" if row.ejection.left_s else "probing"


def _color(row: ReplicaRow) -> str | None:
    if row.state == "draining":
        return "yellow"
    if row.state != "up":
        return "red"
    return None if row.ejection is None else "yellow"


def _bar(share: float | None) -> str:
    if share is None:
        return "-"
    filled = round(min(1.0, max(0.0, share)) * _BAR_CHARS)
    return f"{'#' * filled}{'.' * (_BAR_CHARS - filled)} {share * 100:3.0f} %"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ladder_lines(ladder: ModelLadder, rungs: tuple[Rung, ...]) -> Iterator[Line]:
    recent = ladder.recent
    shares = " > ".join(
        f"{rung.name} {percent(share)}" for rung, share in zip(rungs, recent.shares, strict=True)
    )
    yield Line(f"{printable(ladder.model)}, 10 min, {recent.num_requests:,} requests:", bold=True)
    yield Line(f"  {shares}")
    # What is new in a prompt is no loss of anybody's.
    lost = [(lost, rung) for lost, rung in zip(recent.lost, rungs, strict=True)][1:]
    share, rung = max(lost, key=lambda pair: pair[0] or 0.0)
    if share and share >= 0.01:
        yield Line(f"  {percent(share)} lost: {rung.loss}  (roost doctor tells the cure)")


def _draw(lines: list[Line]) -> None:
    """Write the screen anew, without clearing it first: it would flicker."""
    columns, rows = shutil.get_terminal_size()
    shown = lines[:rows]
    if len(lines) > rows:
        shown[-1] = Line(f"and {len(lines) - rows + 1} more lines: make the window higher")
    drawn = [
        click.style(line.text[:columns], line.color, bold=line.bold or None, dim=line.dim or None)
        for line in shown
    ]
    sys.stdout.write(_HOME + f"{_REST_OF_LINE}\n".join(drawn) + _REST_OF_LINE + _REST_OF_SCREEN)
    sys.stdout.flush()


@contextmanager
def _screen() -> Iterator[_Wait]:
    """A screen of our own and keys as they are pressed, until left in any way."""
    with ExitStack() as undo:
        woken, wakes = os.pipe()
        undo.callback(os.close, woken)
        undo.callback(os.close, wakes)
        os.set_blocking(wakes, False)
        # A signal writes its number to the pipe, so that a window that changes its size is drawn at
        # once; and so that Ctrl-C is no exception, which is lost where it meets a finalizer.
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wakes))
        for number in (signal.SIGWINCH, signal.SIGINT):
            undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        keys = None
        if sys.stdin.isatty():
            keys = sys.stdin.fileno()
            undo.callback(termios.tcsetattr, keys, termios.TCSADRAIN, termios.tcgetattr(keys))
            tty.setcbreak(keys)
        sys.stdout.write(_ENTER)
        undo.callback(sys.stdout.flush)
        undo.callback(sys.stdout.write, _LEAVE)
        yield _Wait(woken, keys)


class _Wait:
    """Waits for time to pass, a key, or a new size."""

    def __init__(self, woken: int, keys: int | None) -> None:
        self._woken = woken
        self._keys = keys

    def __call__(self, limit_s: float) -> bool:
        """Whether to leave."""
        watched = [self._woken] if self._keys is None else [self._woken, self._keys]
        ready, _, _ = select.select(watched, [], [], limit_s)
        if self._woken in ready and signal.SIGINT in os.read(self._woken, 64):
            return True
        if self._keys is None or self._keys not in ready:
            return False
        pressed = os.read(self._keys, 64)
        return not pressed or b"q" in pressed.lower()
