"""`roost top`: one table where piped, a live screen in a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest
from asking import admin_url, complete, fleet
from click.testing import CliRunner

from roost.cli import main
from roost.text_table import duration, percent, table
from roost.top_cli import fleet_lines
from roost_router.fleet_page import Ejection, SourceRow
from roost_wire.load_report import LoadReport


async def top(*arguments: str):
    return await asyncio.to_thread(CliRunner().invoke, main, ["top", *arguments])


async def test_a_pipe_gets_one_table(start_router, replicas):
    router = await start_router(*replicas)
    for replica in replicas:
        replica.cached_tokens = 40
    await complete(router)
    await complete(router, stream=True)

    found = await top("--admin", admin_url(router), "--admin", admin_url(router))

    assert found.exit_code == 0, found.output
    assert "\x1b" not in found.output
    assert found.output.count("2 of 2 replicas up") == 2
    lines = found.output.splitlines()
    head = next(line for line in lines if "replica" in line and "p99" in line)
    rows = [line.split() for line in lines if line.startswith(("  r0", "  r1"))]
    assert head.split()[:2] == ["replica", "state"]
    assert [row[:2] for row in rows] == [["r0", "up"], ["r1", "up"]] * 2
    assert any("40.0" in row for row in rows)
    assert "m, 10 min, 2 requests:" in found.output
    assert "ideal" in found.output
    assert "delivered 40.0 %" in found.output


async def test_states_are_words_colours_and_reasons(start_router, replicas):
    page = await fleet(await start_router(*replicas))
    page.replicas[0].ejection = Ejection("a stream stalled", 2.6)
    page.replicas[1].ejection = Ejection("its probe failed", 0.0)

    lines = list(fleet_lines(page, "there"))
    shown = {line.text.strip(): line.color for line in lines if line.color}

    assert list(shown.values()) == ["yellow"] * 4
    (first, why, second, why_too) = shown
    assert (why, why_too) == ("a stream stalled", "its probe failed")
    assert "ejected 3 s" in first
    assert "probing" in second

    page.replicas[0].state = "down"
    (row,) = [line for line in fleet_lines(page, "there") if line.text.startswith("  r0")]
    assert (row.color, row.text.split()[1]) == ("red", "down")


async def test_replicas_that_drain_and_sources_that_fail_are_shown(start_router, replicas):
    page = await fleet(await start_router(*replicas))
    page.replicas[0].state = "draining"
    page.sources = [
        SourceRow("DNS v:1", 2, 61.0, "no \x1b[2J resolver"),
        SourceRow("x", 1, None, ""),
    ]

    shown = [line.text.strip() for line in fleet_lines(page, "there") if line.color == "yellow"]

    assert shown[0].split()[:2] == ["r0", "draining"]
    assert shown[1].startswith("DNS v:1 fails since 1 min")
    assert "\x1b" not in shown[1]
    assert len(shown) == 2


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "........   0 %"), (0.5, "####....  50 %"), (1.2, "######## 120 %"), (None, " - ")],
)
async def test_kv_use_is_a_bar(start_router, replicas, share, shown):
    page = await fleet(await start_router(replicas[0]))
    page.replicas[0].reported = LoadReport(kv_usage=share)

    assert any(shown in line.text for line in fleet_lines(page, "there"))


async def test_names_of_models_move_no_cursor(start_router, replicas):
    page = await fleet(await start_router(replicas[0]))
    page.replicas[0].models = ("\x1b[2Jm",)

    assert not any("\x1b" in line.text for line in fleet_lines(page, "there"))


async def test_once_where_nobody_listens_is_an_error():
    found = await top("--once", "--admin", "http://127.0.0.1:1")

    assert found.exit_code == 1
    assert "no router answers" in found.output


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3_600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations_have_two_units(value, shown):
    assert duration(value) == shown


def test_columns_are_aligned():
    assert table([("a", "b", ""), ("long", "1", "x")], "<><") == ["  a     b", "  long  1  x"]
    assert (percent(None), percent(0.1234)) == ("-", "12.3 %")


class Terminal:
    """`roost top` in a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 120) -> None:
        self.main, self._side = pty.openpty()
        self.resize(columns)
        self.modes = termios.tcgetattr(self._side)
        command = [sys.executable, "-m", "roost", "top", *arguments]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import os; os.login_tty(0); os.execv({command[0]!r}, {command})",
            ],
            stdin=self._side,
            # Readline gives children of pytest a COLUMNS, which would hide the terminal's own.
            env={k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES"}},
        )
        os.set_blocking(self.main, False)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def press(self, key: bytes) -> None:
        os.write(self.main, key)

    async def until(self, text: str) -> str:
        """Read on until `text` is shown."""
        seen = ""
        async with asyncio.timeout(20):
            while text not in seen:
                try:
                    seen += os.read(self.main, 1 << 16).decode()
                except BlockingIOError:
                    await asyncio.sleep(0.02)
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)
        os.close(self._side)

    async def ended(self) -> int:
        """Its exit status; the terminal is as it was."""
        await self.until("\x1b[?1049l")
        status = await asyncio.to_thread(self.process.wait, 20)
        assert termios.tcgetattr(self._side) == self.modes
        return status


@pytest.fixture
def terminal() -> Iterator[list[Terminal]]:
    """Terminals that a test opens; closed for it."""
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        each.close()


@pytest.mark.e2e
async def test_a_terminal_is_refreshed_and_survives_the_router(start_router, replicas, terminal):
    router = await start_router(*replicas)
    port = router.admin_address[1]
    top = Terminal("--admin", admin_url(router))
    terminal.append(top)

    assert "\x1b[?1049h" in await top.until("2 of 2 replicas up")
    await complete(router)
    await top.until("m, 10 min, 1 requests:")

    await router.stop()
    await top.until("gone for")
    await top.until("2 of 2 replicas up")  # as it was last

    await start_router(*replicas, admin_port=port)
    back = await top.until("\x1b[1mroost")  # no longer dim, and first again
    assert "gone for" not in back.rpartition("\x1b[H")[2]

    top.press(b"x")
    top.press(b"q")
    assert await top.ended() == 0


@pytest.mark.e2e
async def test_a_new_size_is_drawn_at_once_and_ctrl_c_leaves(start_router, replicas, terminal):
    router = await start_router(*replicas)
    top = Terminal("--admin", admin_url(router), columns=200)
    terminal.append(top)
    wide = await top.until("p99 s  model")

    top.resize(40)
    narrow = wide
    async with asyncio.timeout(20):
        while "model" in narrow:  # a wide frame may have been under way
            narrow = (await top.until("\x1b[J")).rpartition("\x1b[H")[2]

    top.press(b"\x03")
    assert await top.ended() == 0
