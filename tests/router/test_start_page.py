"""What a router tells of its replicas when it starts: what is missing, and which flag adds it."""

from __future__ import annotations

import pytest
from asking import fleet

from roost_router.findings import no_kv_events
from roost_router.kv.probe import probe
from roost_router.kv.source import Dialect, KvSource
from roost_router.start_page import StartPage, start_page
from roost_wire.load_report import LoadReport

SOURCE = KvSource(Dialect.VLLM, "tcp://127.0.0.1:5557", block_size=16)


async def test_replicas_are_told_as_they_are_found(start_router, replicas):
    router = await start_router(*replicas)

    sources = await probe(router.placer.fleet.replicas, None)
    page = router.start_page(sources)

    assert [row.name for row in page.rows] == ["r0", "r1"]
    assert {row.models for row in page.rows} == {("m",)}
    assert {row.kv_tokens for row in page.rows} == {16384}
    assert {row.kv_events for row in page.rows} == {"none"}
    assert [f.what for f in page.findings if "KV events" in f.what] == [
        "publishes no KV events: what it evicts is guessed"
    ] * 2


async def test_a_replica_that_is_gone_is_told_as_such(start_router, replicas):
    router = await start_router(*replicas, poll_interval_s=60.0)
    await replicas[0].stop()

    sources = await probe(router.placer.fleet.replicas, None)
    page = router.start_page(sources)

    assert sources["r0"] is None
    assert page.rows[0].kv_events == "unknown"
    assert not [f for f in page.findings if f.replica == "r0" and "KV events" in f.what]


async def told(start_router, replicas, dialect: str, sources, *, follows: bool = False):
    page = await fleet(await start_router(replicas[0]))
    page.replicas[0].dialect = dialect
    return start_page(page, {"r0": sources}, follows_events=follows)


def what(page: StartPage) -> list[str]:
    return [finding.what for finding in page.findings]


async def test_events_that_nobody_follows_name_the_option(start_router, replicas):
    page = await told(start_router, replicas, "vllm", [SOURCE])

    (row,) = page.rows
    assert (row.kv_events, row.block_tokens, row.continues) == ("published", 16, "by text")
    (finding,) = [f for f in page.findings if "not followed" in f.what]
    assert "--tokenizer m=FOLDER" in finding.cure


async def test_events_that_are_followed_are_no_finding(start_router, replicas):
    page = await told(start_router, replicas, "roost", [SOURCE], follows=True)

    (row,) = page.rows
    assert (row.kv_events, row.continues) == ("followed", "exactly")
    assert not [text for text in what(page) if "KV events" in text]


async def test_events_that_the_follower_has_not_asked_for_yet_are_no_finding(
    start_router, replicas
):
    page = await fleet(await start_router(replicas[0]))
    (row,) = page.replicas
    page.findings.append(no_kv_events(row))

    assert not [f for f in told_of(page, [SOURCE]) if "KV events" in f]
    assert [f for f in told_of(page, []) if "KV events" in f]


def told_of(page, sources) -> list[str]:
    return what(start_page(page, {"r0": sources}, follows_events=True))


@pytest.mark.parametrize(
    ("dialect", "flag", "continues"),
    [
        ("vllm", "--kv-events-config", "by text"),
        ("sglang", "--kv-events-config", "by text"),
        ("tensorrt_llm", "event_buffer_max_size", "completions"),
        ("roost", "--kv-events-endpoint", "exactly"),
        ("", "none is known", "completions"),
    ],
)
async def test_a_server_without_events_is_told_its_own_flag(
    start_router, replicas, dialect, flag, continues
):
    page = await told(start_router, replicas, dialect, [])

    (finding,) = [f for f in page.findings if "KV events" in f.what]
    assert flag in finding.cure
    assert page.rows[0].continues == continues


async def test_load_that_is_not_told_is_shown(start_router, replicas):
    router = await start_router(replicas[0])
    page = await fleet(router)
    page.replicas[0].reported = LoadReport()

    (row,) = start_page(page, {}, follows_events=False).rows

    assert not row.tells_load
    assert row.kv_events == "unknown"
