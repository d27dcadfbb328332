"""Each operation of the store, on real servers of both versions; its rights, TLS, cancellation."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme
from stores import PROBE, Lua, Told, fault_of, open_store, until, until_works

from roost_loadtest.redis_servers import VERSIONS, RedisServer
from roost_loadtest.tcp_proxy import TcpProxy
from roost_router.store import connection as connection_module
from roost_router.store.address import AddressError, parse_address
from roost_router.store.client import COMMANDS, Store
from roost_router.store.errors import StoreError, StoreFault

pytestmark = pytest.mark.e2e

KEY = b"roost:{t}:news"
SUM = Lua("return {KEYS[1], ARGV[1] + ARGV[2], false, {1, 'a'}}")


@pytest.fixture(params=VERSIONS)
def server(request) -> Iterator[RedisServer]:
    with RedisServer(request.param) as running:
        yield running


@pytest.fixture
async def store(server) -> AsyncIterator[Store]:
    async with open_store(server.url) as opened:
        assert opened.is_up
        yield opened


async def test_what_is_appended_is_read_in_order_and_by_ids(store):
    assert await store.last_id(KEY) == b"0-0"
    assert await store.read_range(KEY, b"-", 10) == []
    blobs = [b"", b"\x00\r\n$5\r\n", b"x" * 1_000_000]
    ids = [await store.append(KEY, blob, b"0-0") for blob in blobs]
    entries = list(zip(ids, blobs, strict=True))

    assert await store.last_id(KEY) == ids[-1]
    assert await store.read_range(KEY, b"-", 10) == entries
    assert await store.read_range(KEY, ids[1], 1) == entries[1:2]
    assert await store.read_after(KEY, b"0-0", 1, 2) == entries[:2]
    assert await store.read_after(KEY, ids[1], 1, 10) == entries[2:]


async def test_a_stream_forgets_its_oldest_entries(store, server):
    ids = [await store.append(KEY, b"%d" % number, b"0-0") for number in range(500)]
    await store.append(KEY, b"next", ids[400])

    assert 100 <= server.client.xlen(KEY) < 300  # whole nodes of 100 entries are dropped


async def test_a_reader_waits_for_what_comes_and_no_longer(store):
    assert await store.read_after(KEY, b"0-0", 0.05, 10) == []
    assert await store.read_after(KEY, b"0-0", 0, 10) == []
    reading = asyncio.create_task(store.read_after(KEY, b"0-0", 20, 10))
    await asyncio.sleep(0.05)
    entry_id = await store.append(KEY, b"news", b"0-0")

    assert await reading == [(entry_id, b"news")]


async def test_a_reader_that_waits_holds_up_nobody_else(store):
    readings = [asyncio.create_task(store.read_after(KEY, b"0-0", 30, 10)) for _ in range(6)]
    await asyncio.sleep(0.05)
    await store.set(b"roost:{t}:a", b"1", None)
    assert await store.get(b"roost:{t}:a") == b"1"
    await store.append(KEY, b"end", b"0-0")

    assert all(len(entries) == 1 for entries in await asyncio.gather(*readings))


async def test_foreign_entries_are_counted_and_are_got_past(store, server):
    server.client.xadd(KEY, {"a": 1})
    server.client.xadd(KEY, {"b": 1, "c": 2})
    await store.append(KEY, b"ours", b"0-0")

    entries = await store.read_after(KEY, b"0-0", 1, 10)

    assert [blob for _, blob in entries] == [b"", b"", b"ours"]
    assert store.num_foreign == 2
    assert await store.read_after(KEY, entries[-1][0], 0.01, 10) == []


async def test_values_live_as_long_as_told(store, server):
    a, b, c = (b"roost:{t}:%c" % letter for letter in b"abc")
    assert await store.get(a) is None
    await store.set(a, b"\xff\x00", None)
    await store.set(b, b"", 60)
    await store.set(c, b"gone", 0)  # as short as can be
    await until(lambda: not server.client.exists(c))

    assert await store.get_many([a, b, c]) == [b"\xff\x00", b"", None]
    assert await store.get_many([]) == []
    assert server.client.pttl(a) == -1
    assert 50_000 < server.client.pttl(b) <= 60_000
    assert await store.delete([a, b, c]) == 2
    assert await store.delete([]) == 0
    assert await store.get(a) is None


async def test_scripts_are_sent_once_and_again_when_forgotten(store, server):
    expected = [KEY, 3, None, [1, b"a"]]
    assert await store.call(SUM, [KEY], [1, b"2"], 1) == expected
    assert await store.call(SUM, [KEY], [1, b"2"], 1) == expected
    calls = server.client.info("commandstats")
    assert calls["cmdstat_evalsha"]["calls"] == 3
    assert calls.get("cmdstat_script", calls.get("cmdstat_script|load"))["calls"] == 1
    assert "cmdstat_eval" not in calls

    server.client.script_flush()
    assert await store.call(SUM, [KEY], [1, b"2"], 1) == expected


async def test_a_script_whose_sha_is_wrong_is_refused_not_sent_for_ever(store):
    class Wrong(Lua):
        sha = "0" * 40

    assert await fault_of(store.call(Wrong("return 1"), [], [], 1), 1) is StoreFault.REFUSED


async def test_calls_at_once_have_each_its_own_reply(store):
    keys = [b"roost:{t}:%d" % number for number in range(500)]
    await asyncio.gather(*(store.set(key, key[::-1], None) for key in keys))

    assert await asyncio.gather(*map(store.get, keys)) == [key[::-1] for key in keys]


async def test_a_cancelled_call_leaves_no_reply_to_others(store):
    """Each key's value is its name: a reply that went astray would show."""
    keys = [b"roost:{t}:%d" % number for number in range(300)]
    for key in keys:
        await store.set(key, key, None)

    for number, key in enumerate(keys):
        call = asyncio.create_task(store.get(key))
        for _ in range(number % 4):
            await asyncio.sleep(0)
        call.cancel()
        assert await store.get(keys[number - 1]) == keys[number - 1]
        await asyncio.gather(call, return_exceptions=True)
    assert await asyncio.gather(*map(store.get, keys)) == keys


async def test_a_call_past_its_budget_leaves_no_reply_to_others(store, server):
    await store.set(b"roost:{t}:a", b"a", None)
    await store.set(b"roost:{t}:b", b"b", None)
    for _ in range(10):
        server.pause()
        calls = [store.get(b"roost:{t}:a", 0.005), store.read_after(KEY, b"0-0", -0.9, 1)]
        assert await asyncio.gather(*(fault_of(call, 0.1) for call in calls)) == [
            StoreFault.LATE,
            StoreFault.LATE,
        ]
        server.resume()
        await until_works(store)
        assert await store.get(b"roost:{t}:b") == b"b"
        assert await store.read_after(KEY, b"0-0", 0, 1) == []


async def test_a_cancelled_reader_leaves_no_entry_to_the_next(store):
    other = b"roost:{t}:other"
    for _ in range(20):
        reading = asyncio.create_task(store.read_after(KEY, b"$", 20, 1))
        await asyncio.sleep(0.002)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await store.append(KEY, b"late", b"0-0")
        assert await store.read_after(other, b"0-0", 0, 1) == []


async def test_a_cancelled_reader_holds_up_no_other(store):
    reading = asyncio.create_task(store.read_after(KEY, b"$", 60, 1))
    await asyncio.sleep(0.05)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)

    assert await store.read_after(KEY, b"0-0", 0, 1) == []  # not after the minute of the other


async def test_a_closed_store_is_down_and_leaves_no_connection(server):
    told: list[Told] = []
    async with open_store(server.url, told) as store:
        await store.read_after(KEY, b"0-0", 0.001, 1)
    assert await fault_of(store.get(KEY), 1) is StoreFault.DOWN
    assert not store.is_up
    assert told == [Told(is_up=True, why="")]

    await until(lambda: server.client.info()["connected_clients"] == 1)  # this test's own


async def test_a_unix_socket_serves(server):
    with RedisServer(server.version, unix_socket=True) as local:
        async with open_store(local.url) as store:
            await store.append(KEY, b"news", b"0-0")
            assert local.client.xlen(KEY) == 1


async def test_a_database_is_chosen(server):
    async with open_store(f"{server.url}/3") as store:
        await store.set(b"a", b"1", None)
    assert server.client.info("keyspace").keys() >= {"db3"}
    assert server.client.get("a") is None


async def test_a_database_that_is_none_is_told(server):
    told: list[Told] = []
    async with open_store(f"{server.url}/99", told) as store:
        assert not store.is_up
    assert "DB index is out of range" in told[0].why


# Rights.

RIGHTS = " ".join(f"+{command}" for command in COMMANDS)
USERS = (
    "user default on >secret ~* &* +@all",
    f"user roost on >p@ss ~roost:* resetchannels -@all {RIGHTS}",
)


@pytest.fixture(params=VERSIONS)
def guarded(request) -> Iterator[RedisServer]:
    with RedisServer(request.param, users=USERS) as running:
        yield running


async def all_that_routers_do(store: Store) -> None:
    await store.append(KEY, b"news", b"0-0")
    assert len(await store.read_range(KEY, b"-", 10)) == 1
    assert len(await store.read_after(KEY, b"0-0", 1, 10)) == 1
    await store.last_id(KEY)
    await store.set(b"roost:{t}:a", b"1", 1)
    await store.get(b"roost:{t}:a")
    await store.get_many([b"roost:{t}:a"])
    await store.delete([b"roost:{t}:a"])
    await store.call(Lua("return 1"), [KEY], [], 1)


async def test_a_user_with_few_rights_can_do_all_that_routers_do_and_nothing_else(guarded):
    url = guarded.url.replace("redis://", "redis://roost:p%40ss@")
    async with open_store(url) as store:
        assert store.is_up, store.why_down
        await all_that_routers_do(store)
        for refused in (
            store.get(b"others"),
            store.append(b"others", b"news", b"0-0"),
            store.call(Lua("return redis.call('KEYS', '*')"), [], [], 1),
            store.call(Lua("return redis.call('GET', 'others')"), [], [], 1),
            *(store._call(tuple(words.split()), 1) for words in FORBIDDEN),
        ):
            assert await fault_of(refused, 1) is StoreFault.REFUSED
        assert store.is_up


FORBIDDEN = (
    "FLUSHALL", "FLUSHDB", "KEYS *", "CONFIG GET *", "ACL LIST", "CLIENT LIST", "DEBUG SLEEP 0",
    "EVAL 1 0", "SCRIPT FLUSH", "SHUTDOWN", "MONITOR", "SCAN 0", "REPLICAOF NO ONE", "INFO",
)  # fmt: skip


def test_operators_are_told_these_rights():
    shown = (Path(__file__).parents[2] / "docs/operations.md").read_text()

    for command in set(COMMANDS):
        assert f" +{command}" in shown


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("right", [command for command in COMMANDS if command != "asking"])
async def test_each_right_is_needed(version, right):
    """But for `asking`, which is for clusters."""
    others = " ".join(f"+{command}" for command in COMMANDS if command != right)
    users = ("user default on nopass ~* +@all", f"user roost on >p@ss ~roost:* -@all {others}")
    with RedisServer(version, users=users) as server:
        url = server.url.replace("://", "://roost:p%40ss@")
        async with open_store(f"{url}/1") as store:
            with pytest.raises(StoreError, match=r"NOPERM|no permissions"):
                await all_that_routers_do(store)


@pytest.mark.parametrize(
    ("credentials", "words"),
    [
        ("", "NOAUTH"),
        ("roost:wrong@", "WRONGPASS"),
        ("nobody:p@ss@", "WRONGPASS"),
    ],
)
async def test_a_wrong_password_is_told_and_never_shown(guarded, credentials, words):
    told: list[Told] = []
    async with open_store(guarded.url.replace("://", f"://{credentials}"), told) as store:
        assert not store.is_up
        assert await fault_of(store.get(KEY), 1) is StoreFault.DOWN
    assert words in told[0].why
    assert "wrong" not in told[0].why
    assert len(told) == 1  # the same cause is not told again and again


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_user_who_may_not_write_is_told(version):
    users = ("user default on nopass ~* +@all", "user roost on >pw ~roost:* +get")
    told: list[Told] = []
    with RedisServer(version, users=users) as server:
        async with open_store(server.url.replace("://", "://roost:pw@"), told) as store:
            assert not store.is_up
    assert "NOPERM" in told[0].why


# TLS: neither binary can speak it, so a proxy before a real server does.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority, tmp_path):
    """CA file, and a certificate of ours with its key."""
    ours = authority.issue_cert("router.example")
    paths = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
    authority.cert_pem.write_to_path(paths[0])
    ours.cert_chain_pems[0].write_to_path(paths[1])
    ours.private_key_pem.write_to_path(paths[2])
    return dict(zip(("ca_file", "cert_file", "key_file"), map(str, paths), strict=True))


def server_side(authority: trustme.CA, name: str, *, asks_clients: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    if asks_clients:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    return context


async def test_tls_serves_a_client_with_a_certificate(server, authority, files):
    context = server_side(authority, "127.0.0.1", asks_clients=True)
    with TcpProxy(server.port, context) as proxy:
        async with open_store(f"rediss://127.0.0.1:{proxy.port}", **files) as store:
            assert store.is_up, store.why_down
            await store.append(KEY, b"x" * 300_000, b"0-0")
            assert len(await store.read_after(KEY, b"0-0", 1, 10)) == 1


@pytest.mark.parametrize("wrong", ["authority", "name", "no certificate", "no TLS"])
async def test_tls_that_proves_nothing_is_refused(server, authority, files, wrong):
    told: list[Told] = []
    signer = trustme.CA() if wrong == "authority" else authority
    name = "other.example" if wrong == "name" else "127.0.0.1"
    context = server_side(signer, name, asks_clients=wrong == "no certificate")
    options = {"ca_file": files["ca_file"]}
    with TcpProxy(server.port, None if wrong == "no TLS" else context) as proxy:
        async with open_store(f"rediss://127.0.0.1:{proxy.port}", told, **options) as store:
            await until(lambda: bool(told))
            assert not store.is_up
            assert await fault_of(store.get(KEY), 1) is StoreFault.DOWN
    assert told[0].why
    if wrong in {"authority", "name"}:
        assert "certificate verify failed" in told[0].why


def test_certificates_that_cannot_be_read_are_named(tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    for path in (junk, tmp_path / "missing.pem"):
        with pytest.raises(AddressError, match=path.name):
            Store(parse_address("rediss://h", ca_file=str(path)), lambda is_up, why: None)


# Servers that are none.


@pytest.mark.interpreted
async def test_a_reply_without_end_is_cut_off(store, server, monkeypatch):
    monkeypatch.setattr(connection_module, "MAX_REPLY_BYTES", 1_000_000)
    server.client.set("roost:{t}:a", b"x" * 900_000)
    server.client.set("roost:{t}:b", b"x" * 9_000_000)

    for _ in range(3):  # more than one may have, in all
        assert len(await store.get(b"roost:{t}:a", 5)) == 900_000
    assert await fault_of(store.get(b"roost:{t}:b", 5), 5) is StoreFault.NONSENSE
    await until_works(store)


@pytest.mark.interpreted
async def test_what_a_server_does_not_read_is_bounded(store, server, monkeypatch):
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1_000_000)
    server.pause()
    calls = [
        asyncio.create_task(fault_of(store.append(KEY, b"x" * 500_000, b"0-0", 0.5), 0.5))
        for _ in range(100)
    ]
    faults = await asyncio.gather(*calls)
    server.resume()

    assert set(faults) == {StoreFault.LATE}
    await until_works(store)
    assert server.client.xlen(KEY) < 50


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":1\r\n:2\r\n:3\r\n", b""])
async def test_a_server_that_is_no_redis_is_down(words):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(words)
        writer.close()

    other = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    told: list[Told] = []
    async with open_store(f"redis://127.0.0.1:{port}", told) as store:
        await until(lambda: not store.is_up and len(told) > 0)
        with pytest.raises(StoreError):
            await store.get(KEY)
    other.close()


async def test_the_probe_key_lives_a_second(store, server):
    assert server.client.pttl(PROBE) <= 1000
