"""Replicas that register themselves: real `roost register`, real Redis, real routers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asking import complete, until
from click.testing import CliRunner
from fake_replica import FakeReplica
from processes import Process
from stores import open_store

from roost.cli import main
from roost_loadtest.redis_servers import RedisServer
from roost_router.app import Router
from roost_router.discovery.registrar import Registrar
from roost_router.fleet.replica import Membership
from roost_router.keys import make_key
from roost_router.store import scripts
from roost_router.store.members import Members
from roost_router.store.published_keys import PublishedKeys
from roost_router.store.secret import ClusterSecret

pytestmark = pytest.mark.e2e  # Redis, routers and others, as processes

SECRET = "a secret that is thirty-two bytes"
LIFE_S = 5.0
Register = Callable[..., Process]


@pytest.fixture(params=["6.2", "8.2"])
def server(request):
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture
def secret(tmp_path) -> Path:
    path: Path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


@pytest.fixture
def options(server, secret):
    """Of a router that finds its replicas there."""
    return {"redis": server.url, "redis_secret_file": secret, "replicas_redis": True}


@pytest.fixture
def register(server, secret) -> Iterator[Register]:
    """Starts `roost register`; returns when its replicas are in the store."""
    started: list[Process] = []

    def start(*fakes: FakeReplica) -> Process:
        words = ["--redis", server.url, "--redis-secret-file", str(secret), "--life", f"{LIFE_S}"]
        started.append(Process("register", *(fake.url for fake in fakes), *words))
        return started[-1]

    yield start
    for process in started:
        process.stop()


async def registered(process: Process, num_replicas: int = 1) -> None:
    for _ in range(num_replicas):
        await asyncio.to_thread(process.until_line, "is registered")


def urls(router: Router) -> list[str]:
    return [replica.url for replica in router.placer.fleet.replicas]


async def test_a_router_that_starts_cold_has_them_before_it_answers(
    register, replicas, options, start_router
):
    await registered(register(*replicas), 2)

    router = await start_router(**options)

    assert sorted(urls(router)) == sorted(fake.url for fake in replicas)
    assert await complete(router) == 200


async def test_they_join_and_leave_a_router_that_runs(register, replicas, options, start_router):
    one, other = replicas
    await registered(register(one))
    router = await start_router(**options)
    assert urls(router) == [one.url]

    process = register(other)
    await until(lambda: urls(router) == [one.url, other.url])
    await asyncio.to_thread(process.stop)
    await until(lambda: urls(router) == [one.url])
    assert await complete(router) == 200


async def test_a_request_that_runs_on_one_that_leaves_goes_on(
    register, replicas, options, start_router
):
    one, other = replicas
    await registered(register(one))
    process = register(other)
    router = await start_router(**options)
    await until(lambda: len(urls(router)) == 2)
    one.fault = other.fault = "hang"
    asking = [asyncio.create_task(complete(router, f"{n} " * 800, stream=True)) for n in range(8)]
    fleet = router.placer.fleet
    await until(lambda: all(replica.num_in_flight for replica in fleet.replicas))

    await asyncio.to_thread(process.stop)
    await until(lambda: [r.membership for r in fleet.leaving] == [Membership.LEAVING])
    one.fault = other.fault = None
    for fake in replicas:
        fake.gate.set()

    assert await asyncio.gather(*asking) == [200] * 8
    await until(lambda: not fleet.leaving)


async def test_after_a_flush_they_are_back_and_nobody_left_meanwhile(
    register, replicas, options, start_router, server, caplog
):
    await registered(register(*replicas), 2)
    router = await start_router(**options)
    key = ClusterSecret(SECRET.encode()).prefix + b"members"

    server.client.flushall()
    await until(lambda: server.client.hlen(key) == 2)
    await asyncio.sleep(2.0)  # until what was heard before would have been missed

    assert len(urls(router)) == 2
    assert "leaves" not in caplog.text


async def test_one_that_dies_is_gone_after_its_life(register, replicas, options, start_router):
    one, other = replicas
    await registered(register(*replicas), 2)
    router = await start_router(**options)

    await other.stop()

    await until(lambda: urls(router) == [one.url], timeout_s=30)


async def test_with_its_registrar_killed_it_is_gone_after_its_life(
    register, replicas, options, start_router
):
    one, other = replicas
    await registered(register(one))
    process = register(other)
    await registered(process)
    router = await start_router(**options)
    assert len(urls(router)) == 2

    await asyncio.to_thread(process.kill)

    await until(lambda: urls(router) == [one.url], timeout_s=30)


async def test_while_the_store_is_away_they_stay_and_longer_than_their_lives(
    register, replicas, options, start_router, server, caplog
):
    await registered(register(*replicas), 2)
    router = await start_router(**options)

    server.kill()
    await asyncio.sleep(LIFE_S + 1)
    assert await complete(router) == 200
    assert len(urls(router)) == 2
    assert router.discovery.status()[0].failing_since is not None
    server.start()  # empty
    await until(lambda: router.discovery.status()[0].failing_since is None)
    key = ClusterSecret(SECRET.encode()).prefix + b"members"
    await until(lambda: server.client.hlen(key) == 2)

    assert len(urls(router)) == 2
    assert "leaves" not in caplog.text


async def test_a_router_starts_without_the_store_and_finds_them_later(
    register, replicas, options, start_router, server
):
    server.kill()
    router = await start_router(**options)
    assert urls(router) == []

    server.start()
    await registered(register(*replicas), 2)

    await until(lambda: len(urls(router)) == 2)


async def test_what_can_be_no_replica_is_left_out(options, start_router, server, caplog):
    async with open_store(server.url) as store:
        members = Members(store, ClusterSecret(SECRET.encode()))
        await members.write(b"x", "http://169.254.169.254", 60, 1.0)
        router = await start_router(**options)
        assert urls(router) == []
        assert "169.254.169.254" in caplog.text


async def test_nobody_is_believed_who_lacks_the_secret(replicas, server, caplog):
    """Nor is what one member said believed of another."""
    ours = ClusterSecret(SECRET.encode())
    key = ours.prefix + b"members"
    async with open_store(server.url) as store:
        members = Members(store, ours)
        await members.write(b"x", replicas[0].url, 60, 1.0)
        said = server.client.hget(key, b"x")
        server.client.hset(
            key, mapping={b"y": said, b"z": b"nonsense", b"w": b"9" * 15 + b" \0\xff"}
        )

        there = await members.read(1.0)

        assert [one.url for one in there] == [replicas[0].url]
        assert 59 < there[0].left_s <= 60
        assert set(server.client.hkeys(key)) == {b"x", b"y", b"w"}
        assert "2 members that cannot be read" in caplog.text
        caplog.clear()
        await members.read(1.0)
        assert not caplog.text


async def test_whatever_bytes_a_seal_has_they_come_back(server):
    async with open_store(server.url) as store:
        members = Members(store, ClusterSecret(SECRET.encode()))
        for number in range(64):
            await members.write(b"%d" % number, f"http://h{number}", 60, 1.0)

        assert len(await members.read(1.0)) == 64


async def test_a_full_store_still_takes_beats(replicas, server):
    """Redis that is full refuses writes; a fleet must not vanish for that."""
    server.client.config_set("maxmemory", 1)
    async with open_store(server.url) as store:
        members = Members(store, ClusterSecret(SECRET.encode()))
        for url in ("http://a", "http://b"):
            await members.write(b"x", url, 60, 1.0)

        assert [one.url for one in await members.read(1.0)] == ["http://b"]


async def test_a_user_with_the_rights_that_we_deploy_may_do_all_this():
    rights = (Path(__file__).parents[2] / "deploy/redis/roost.acl").read_text().strip()
    users = ["user default off", f"user roost on >secret {rights}"]
    secret = ClusterSecret(SECRET.encode())
    with RedisServer(users=users) as server:
        async with open_store(f"redis://roost:secret@127.0.0.1:{server.port}") as store:
            members, published = Members(store, secret), PublishedKeys(store, secret)
            await members.write(b"x", "http://a", 60, 1.0)
            assert len(await members.read(1.0)) == 1
            assert await published.publish(make_key(b"k" * 32)[1], 1) == 1
            await published.restore(b"")
            args = (b"x", 60, b"1")
            assert await store.call(scripts.SPEND, (secret.prefix + b"quota:",), args, 1.0)


@pytest.mark.parametrize(
    ("health", "models", "is_told"),
    [(200, 500, True), (503, 200, False), (404, 200, True), (404, 401, True), (404, 404, False)],
)
async def test_one_is_told_of_while_it_answers(server, health, models, is_told, caplog):
    caplog.set_level("INFO")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        status = health if b" /health " in asked.split(b"\r\n")[0] else models
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with listening, open_store(server.url) as store:
        members = Members(store, ClusterSecret(SECRET.encode()))
        registrar = Registrar(members, (url,), 60.0)
        running = asyncio.create_task(registrar.run())
        await until(lambda: url in caplog.text)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        assert [one.url for one in await members.read(1.0)] == [url] * is_told
        await registrar.leave()
        assert not [one for one in await members.read(1.0) if one.is_here]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://h:1/v1"], "without /v1"),
        (["http://h:1", "http://H:1/"], "given twice"),
        (["http://169.254.169.254"], "no replica"),
        (["http://h:1", "--life", "4.9"], "life"),
        ([], "URL"),
    ],
)
def test_what_cannot_be_registered_is_said_at_once(secret, arguments, said):
    command = ["register", *arguments, "--redis", "redis://h", "--redis-secret-file", str(secret)]

    result = CliRunner().invoke(main, command)

    assert result.exit_code != 0
    assert said in result.output
