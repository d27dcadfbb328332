"""The benchmark of layouts in Redis: every layout finds what was added; tables and goals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from roost_loadtest.bench_redis import (
    LENGTHS,
    Figures,
    RedisBenchConfig,
    bench_redis,
    goals,
    report,
)
from roost_loadtest.bench_redis_layouts import Bits, Command, Layout, LlmD, OldSglang, Ours
from roost_loadtest.redis_servers import RedisServer, binary


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer("6.2") as running:
        yield running


def send(server: RedisServer, commands: list[Command]) -> list[Any]:
    return [server.client.execute_command(*command) for command in commands]


@pytest.mark.parametrize(
    ("layout", "kept"),
    [(Ours(), 300), (LlmD(), 600), (OldSglang(), 300), (Bits(), 300)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_layout_finds_what_was_added_and_not_what_was_removed(
    server: RedisServer, layout: Layout, kept: int
) -> None:
    server.client.flushall()
    ids = Random(1).randbytes(8 * 300)
    layout.prepared([_raw(reply) for reply in send(server, layout.prepare())])
    nothing = send(server, layout.lookup(ids))

    send(server, layout.add(0, ids))
    send(server, layout.add(1, ids[: 8 * 100]))
    keys = server.client.dbsize()
    both = send(server, layout.lookup(ids))
    send(server, layout.remove(0, ids))
    one = send(server, layout.lookup(ids))

    assert keys <= kept + 1
    assert len({repr(nothing), repr(both), repr(one)}) == 3
    if isinstance(layout, Ours):
        assert both[0][1:] == [100, b"\x00\x03", 300, b"\x00\x01"]
    if isinstance(layout, OldSglang):
        assert one == [[b"http://10.0.0.1:8000", 100]]


def _raw(reply: Any) -> Any:
    return reply.encode() if isinstance(reply, str) else reply


def test_goals_are_met_at_their_edge_and_not_beyond() -> None:
    lookups = dict.fromkeys(LENGTHS, 100.0)
    edge = Figures("ours", 1_000_000, 20.0, 4.0, 6.0, lookups, lookups, 100.0)
    beyond = Figures(
        "ours", 1_000_000, 20.1, 4.0, 6.1, lookups, dict.fromkeys(LENGTHS, 100.1), 100.1
    )

    assert [line.rpartition(": ")[2] for line in goals([edge])[1:]] == ["met"] * 4
    assert [line.rpartition(": ")[2] for line in goals([beyond])[1:]] == ["NOT met"] * 4


def test_peers_are_told_as_multiples_of_ours() -> None:
    five, two, nine = (dict.fromkeys(LENGTHS, us) for us in (5.0, 2.0, 9.0))
    ours = Figures("ours", 10, 20.0, 1.0, 1.0, five, two, 1.0)
    peer = Figures("peer", 5, 50.0, 2.0, 2.0, five, nine, 3.0)

    lines = report([ours, peer])

    assert "| bytes a block | 20.0 | 50.0 (2.5x) |" in lines
    assert "| blocks/s a core | 1,000,000 | 500,000 (0.5x) |" in lines
    assert "| lookup of 2,048, CPU us | 2 | 9 (4.5x) |" in lines
    assert "| usual lookup of 2,048, CPU us | 1 | 3 (3.0x) |" in lines


@pytest.mark.e2e
def test_a_small_run_prints_every_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RedisBenchConfig(
        server=binary("8.2"), blocks=[4096], peer_blocks=4096, rounds=2, json_path=tmp_path / "r"
    )

    bench_redis(config)

    shown = capsys.readouterr().out
    assert all(name in shown for name in ("ours", "llm-d", "sglang, old", "bits, MGET"))
    assert "goal 200,000" in shown
    assert (tmp_path / "r").read_text().count('"layout"') == 4
