"""Keys of clients through the store: real Redis, real routers, real `roost keys publish`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from asking import get, until
from click.testing import CliRunner, Result
from processes import Process
from stores import open_store

from roost.cli import main
from roost_loadtest.redis_servers import RedisServer
from roost_router.app import Router
from roost_router.config import ConfigError, RouterConfig
from roost_router.keys import KeyFileError, make_key
from roost_router.store.published_keys import KeyFollower, PublishedKeys, UnusableKeysError
from roost_router.store.secret import ClusterSecret

pytestmark = pytest.mark.e2e  # Redis, routers and others, as processes

SECRET = "a secret that is thirty-two bytes"
CLUSTER = ClusterSecret(SECRET.encode())
KEY = CLUSTER.prefix + b"api-keys"
(ALICE, ALICES), (BOB, BOBS), (EVE, EVES) = (make_key(bytes([n]) * 32) for n in range(3))


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
    """Of a router whose clients' keys are there."""
    return {"redis": server.url, "redis_secret_file": secret, "api_keys_redis": True}


@pytest.fixture
def publish(server, secret, tmp_path):
    """Runs `roost keys publish` for a file with these lines."""

    def run(*lines: str) -> Result:
        path: Path = tmp_path / "keys"
        path.write_text("# of the test\n\n" + "".join(f"{line}\n" for line in lines))
        where = ["--redis", server.url, "--redis-secret-file", str(secret)]
        return CliRunner().invoke(main, ["keys", "publish", str(path), *where])

    return run


async def publishing(publish, *lines: str) -> None:
    result = await asyncio.to_thread(publish, *lines)
    assert result.output == f"published {len(lines)} keys\n"


async def ask(router: Router, key: str | None) -> tuple[int, str | None]:
    """Status and error code of a request with this key."""
    url = "http://{}:{}/v1/models".format(*router.address)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.get(url) as answer:
            page = json.loads(await answer.read())
            return answer.status, page["error"]["code"] if "error" in page else None


async def until_let_in(router: Router, key: str) -> None:
    async with asyncio.timeout(10):
        while (await ask(router, key))[0] != 200:
            await asyncio.sleep(0.05)


async def until_refused(router: Router, key: str) -> None:
    async with asyncio.timeout(10):
        while await ask(router, key) != (401, "invalid_api_key"):
            await asyncio.sleep(0.05)


async def test_a_router_knows_the_keys_before_it_answers(publish, options, start_router, replicas):
    await publishing(publish, f"{ALICES} alice", BOBS)

    router = await start_router(*replicas, **options)

    for key, answer in ((ALICE, (200, None)), (BOB, (200, None)), (EVE, (401, "invalid_api_key"))):
        assert await ask(router, key) == answer
    assert await ask(router, None) == (401, "invalid_api_key")


async def test_a_key_that_was_revoked_opens_no_router(publish, options, start_router, replicas):
    await publishing(publish, ALICES, BOBS)
    routers = [await start_router(*replicas, **options) for _ in range(2)]
    for router in routers:
        assert (await ask(router, ALICE))[0] == 200

    await publishing(publish, BOBS, EVES)

    for router in routers:
        await until_refused(router, ALICE)  # within 10 s
        assert (await ask(router, BOB))[0] == (await ask(router, EVE))[0] == 200


async def test_until_keys_were_read_nobody_comes_in(publish, options, start_router, replicas):
    """A key that may be valid is told to come again; who has none is told so."""
    router = await start_router(*replicas, **options)

    assert await ask(router, ALICE) == (503, "keys_unknown")
    assert await ask(router, None) == (401, "invalid_api_key")
    assert (await get(router, "/ready"))[0] == 503

    await publishing(publish, ALICES)
    await until_let_in(router, ALICE)
    assert await ask(router, EVE) == (401, "invalid_api_key")
    assert (await get(router, "/ready"))[0] == 200


async def test_without_the_store_a_router_starts_closed(
    publish, options, start_router, replicas, server
):
    server.kill()
    router = await start_router(*replicas, **options)
    assert await ask(router, ALICE) == (503, "keys_unknown")

    server.start()
    await publishing(publish, ALICES)
    await until_let_in(router, ALICE)


async def test_what_was_read_stays_when_the_store_dies_and_is_given_back(
    publish, options, start_router, replicas, server
):
    await publishing(publish, ALICES)
    router = await start_router(*replicas, **options)
    server.kill()
    assert (await ask(router, ALICE))[0] == 200
    assert (await ask(router, EVE))[0] == 401

    server.start()  # empty
    await until(lambda: bool(server.client.exists(KEY)))

    late = await start_router(*replicas, **options)
    assert (await ask(late, ALICE))[0] == 200


async def test_keys_of_a_file_count_beside_them(publish, options, start_router, replicas, tmp_path):
    path = tmp_path / "file"
    path.write_text(f"{BOBS} bob\n")
    router = await start_router(*replicas, api_keys_file=path, **options)
    assert (await ask(router, BOB))[0] == 200
    assert await ask(router, ALICE) == (503, "keys_unknown")

    await publishing(publish, ALICES)
    await until_let_in(router, ALICE)
    assert (await ask(router, BOB))[0] == 200
    path.write_text(EVES)
    router.reload()
    assert [(await ask(router, key))[0] for key in (ALICE, BOB, EVE)] == [200, 401, 200]


async def test_only_who_has_the_secret_publishes(server, options, start_router, replicas, publish):
    await publishing(publish, ALICES)
    router = await start_router(*replicas, **options)
    async with open_store(server.url) as store:
        others = PublishedKeys(store, ClusterSecret(SECRET.encode() + b"!"))
        await others.publish(EVES, 1)
        theirs = await others.fetch()
        server.client.set(KEY, theirs)
        ours = PublishedKeys(store, CLUSTER)
        with pytest.raises(UnusableKeysError, match="secret"):
            ours.read(await ours.fetch())

    await asyncio.sleep(4)  # more than a look
    assert (await ask(router, EVE))[0] == 401
    assert (await ask(router, ALICE))[0] == 200
    await publishing(publish, BOBS)  # takes its place
    await until_let_in(router, BOB)


async def test_an_old_list_is_not_taken_again(server, monkeypatch):
    monkeypatch.setattr("roost_router.store.published_keys.LOOK_S", 0.01)
    told = []
    async with open_store(server.url) as store:
        published = PublishedKeys(store, CLUSTER)
        await published.publish(f"{ALICES}\n{BOBS}", 1_000)
        old = await published.fetch()
        await published.publish(ALICES, 5)  # by a clock that is behind
        follower = KeyFollower(published, told.append)
        await follower.start(5.0)
        assert [len(keys) for keys in told] == [1]

        server.client.set(KEY, old)
        await asyncio.sleep(0.2)
        assert [len(keys) for keys in told] == [1]
        await published.publish(f"{ALICES}\n{BOBS}\n{EVES}", 2_000)
        await until(lambda: len(told) == 2)
        await follower.close()

    assert [len(keys) for keys in told] == [1, 3]


async def test_redis_is_told_neither_keys_nor_hashes(server):
    async with open_store(server.url) as store:
        await PublishedKeys(store, CLUSTER).publish(f"{ALICES} alice", 1)

    value = server.client.get(KEY)
    for secret in (ALICE, ALICES[7:], "alice"):
        assert secret.encode() not in value
    assert server.client.ttl(KEY) == -1


async def test_what_is_given_back_takes_no_ones_place(server):
    async with open_store(server.url) as store:
        published = PublishedKeys(store, CLUSTER)
        await published.publish(ALICES, 1)
        before = await published.fetch()
        await published.publish(f"{BOBS}\n{EVES}", 2)

        await published.restore(before)

        assert len(published.read(await published.fetch()).keys) == 2


@pytest.mark.parametrize("lines", [(), ("sk-canary",)])
def test_what_is_no_file_of_keys_is_not_published(publish, server, lines):
    result = publish(*lines)

    assert result.exit_code == 1
    assert "canary" not in result.output
    assert not server.client.exists(KEY)


def test_a_store_that_is_away_is_told_of(publish, server):
    server.kill()

    result = publish(ALICES)

    assert result.exit_code == 1
    assert "Error: " in result.output


def test_without_redis_it_is_an_error():
    with pytest.raises(ConfigError, match="--api-keys-redis needs --redis"):
        RouterConfig(replicas=("http://h",), api_keys_redis=True)
    with pytest.raises(ConfigError, match="--replicas-redis needs --redis"):
        RouterConfig(replicas=(), replicas_redis=True)


def test_other_machines_may_come_where_keys_are_published(tmp_path):
    redis = {"redis": "redis://h", "redis_secret_file": tmp_path}
    with pytest.raises(ConfigError, match="without a key"):
        RouterConfig(replicas=("http://h",), host="0.0.0.0", **redis)

    RouterConfig(replicas=("http://h",), host="0.0.0.0", api_keys_redis=True, **redis)


async def test_a_router_of_its_own_process_takes_them(publish, server, secret, replicas):
    await publishing(publish, ALICES)
    words = ["--redis", server.url, "--redis-secret-file", str(secret), "--api-keys-redis"]
    urls = [replica.url for replica in replicas]
    process = Process("route", "--port", "0", "--admin-port", "0", *urls, *words)
    try:
        found = await asyncio.to_thread(process.until_line, r"routing on (http://\S+), admin")
        async with aiohttp.ClientSession() as session:
            for key, status in ((ALICE, 200), (EVE, 401)):
                headers = {"authorization": f"Bearer {key}"}
                async with session.get(f"{found[1]}/v1/models", headers=headers) as answer:
                    assert answer.status == status
    finally:
        await asyncio.to_thread(process.stop)


def test_no_keys_are_no_file(server):
    async def publish_nothing() -> None:
        async with open_store(server.url) as store:
            with pytest.raises(KeyFileError):
                await PublishedKeys(store, CLUSTER).publish("# none\n", 1)

    asyncio.run(publish_nothing())
