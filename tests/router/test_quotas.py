"""Limits of keys: what comes in under them, at one router and at several that share a store."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from asking import until
from redis_twins import SpendTwin
from stores import open_store

from roost_loadtest.redis_servers import RedisServer
from roost_router.app import Router
from roost_router.errors import QuotaError
from roost_router.keys import KeyFileError, make_key, parse_keys
from roost_router.quotas import Limits, Quotas
from roost_router.store import scripts
from roost_router.store.secret import ClusterSecret

SECRET = "a secret that is thirty-two bytes"
(ALICE, ALICES), (BOB, BOBS) = (make_key(bytes([n]) * 32) for n in range(2))


def quotas(requests: int = 0, tokens: int = 0) -> Quotas:
    made = Quotas()
    made.set_limits({"a": Limits(requests, tokens)}, 0.0)
    return made


def num_let_in(of: Quotas, now: float, num_tokens: int = 1, most: int = 1000) -> int:
    """How many of `most` requests come in at once."""
    for number in range(most):
        try:
            of.charge("a", num_tokens, now)
        except QuotaError:
            return number
    return most


@pytest.mark.parametrize(
    ("tail", "limits"),
    [
        ("", {}),
        (" alice", {}),
        (" alice rpm=60", {"alice": Limits(60, 0)}),
        (" alice tpm=100000\trpm=1", {"alice": Limits(1, 100_000)}),
        (" rpm=999999999", {f"key-{ALICES[7:15]}": Limits(999_999_999, 0)}),
    ],
)
def test_limits_are_read_from_the_file(tail, limits):
    ring = parse_keys(ALICES + tail)

    assert ring.limits == limits
    assert (
        ring.owner(f"Bearer {ALICE}".encode())
        == (tail.split() or [""])[0].replace("rpm=999999999", "")
        or f"key-{ALICES[7:15]}"
    )


@pytest.mark.parametrize(
    "tail",
    [
        " alice rpm=0", " alice rpm=-1", " alice rpm=1.5", " alice rpm=", " alice rpm=1000000000",
        " alice rps=1", " alice rpm=1 rpm=2", " alice rpm=1 tpm=1 rpm=1", " rpm=1 alice",
    ],
)  # fmt: skip
def test_what_is_no_limit_is_refused_by_its_line(tail):
    with pytest.raises(KeyFileError, match="line 2"):
        parse_keys(f"# keys\n{ALICES}{tail}")


def test_keys_of_one_name_have_the_same_limits():
    assert parse_keys(f"{ALICES} a rpm=5\n{BOBS} a rpm=5").limits == {"a": Limits(5, 0)}
    for other in ("", " rpm=6", " rpm=5 tpm=1"):
        with pytest.raises(KeyFileError, match="line 2 has other limits"):
            parse_keys(f"{ALICES} a rpm=5\n{BOBS} a{other}")


def test_a_minutes_worth_comes_in_at_once_and_then_as_the_limit_says():
    one = quotas(requests=60)

    assert num_let_in(one, 0.0) == 60
    with pytest.raises(QuotaError):
        one.charge("a", 1, 0.0)
    assert num_let_in(one, 10.0) == 10
    assert num_let_in(one, 1000.0) == 60


def test_without_limits_all_come_in():
    one = quotas()

    assert num_let_in(one, 0.0) == 1000
    one.charge("nobody", 10**9, 0.0)


def test_a_prompt_may_be_larger_than_a_minutes_worth_and_is_paid_for():
    one = quotas(tokens=600)
    one.charge("a", 1800, 0.0)

    with pytest.raises(QuotaError) as raised:
        one.charge("a", 1, 0.0)
    assert (raised.value.type, raised.value.retry_after_s) == ("tokens", 120)
    with pytest.raises(QuotaError):
        one.charge("a", 1, 119.9)
    one.charge("a", 1, 120.1)


def test_what_was_estimated_is_corrected():
    one = quotas(requests=60, tokens=600)
    charge = one.charge("a", 500, 0.0)
    one.settle(charge, 100)
    assert one.charge("a", 0, 0.0).tokens.allowance == 500
    one.settle(charge, None)  # nobody counted
    assert one.charge("a", 0, 0.0).tokens.allowance == 500


def test_what_no_replica_got_is_given_back():
    one = quotas(requests=60, tokens=600)
    charge = one.charge("a", 500, 0.0)

    one.give_back(charge)

    assert (charge.requests.allowance, charge.tokens.allowance) == (60, 600)
    assert [meter.spent for meter in one.take(every=True)] == [0, 0]


def test_limits_that_stay_keep_what_was_spent():
    one = quotas(requests=60)
    num_let_in(one, 0.0)

    one.set_limits({"a": Limits(60, 0), "b": Limits(1, 1)}, 0.0)
    assert num_let_in(one, 0.0) == 0
    one.set_limits({"a": Limits(30, 0)}, 0.0)
    assert num_let_in(one, 0.0) == 30


def test_what_is_told_is_told_once():
    one = quotas(requests=60)
    one.charge("a", 1, 0.0)
    (meter,) = one.take(every=False)
    one.charge("a", 1, 0.0)  # while the store is being told
    assert (meter.in_flight, meter.spent) == (1, 1)

    one.heard(meter, 40.0, 0.0)
    assert meter.allowance == 39
    one.failed(one.take(every=False))
    assert one.take(every=False) == []
    assert meter.allowance == 39


class Shared:
    """Routers that share limits through the script's twin, in virtual time."""

    def __init__(self, num_routers: int, limits: Limits, seed: int) -> None:
        self.rng = Random(seed)
        self.twin = SpendTwin()
        self.routers = []
        for _ in range(num_routers):
            router = Quotas()
            router.num_routers = num_routers
            router.set_limits({"a": limits}, 0.0)
            self.routers.append(router)
        self.told_at = [self.rng.uniform(0, 0.02) for _ in self.routers]
        self.looked_at = [0.0 for _ in self.routers]

    def pass_time(self, now: float) -> None:
        for number, router in enumerate(self.routers):
            if now < self.told_at[number]:
                continue
            self.told_at[number] = now + 0.02 + self.rng.uniform(0, 0.01)
            every = now - self.looked_at[number] >= 1.0
            if every:
                self.looked_at[number] = now
            for meter in router.take(every=every):
                level = self.twin(round(now * 1e6), meter.name, meter.limit, meter.in_flight)
                router.heard(meter, level, now)

    def play(self, duration_s: float, rate_per_s: float, num_tokens: int, bias: float) -> int:
        """How many come in. `bias`: the share of requests that go to the first router."""
        now, num_in = 0.0, 0
        while now < duration_s:
            now += self.rng.expovariate(rate_per_s)
            self.pass_time(now)
            is_first = self.rng.random() < bias
            router = self.routers[0] if is_first else self.rng.choice(self.routers)
            try:
                router.charge("a", num_tokens, now)
                num_in += 1
            except QuotaError:
                pass
        return num_in


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    ("limits", "num_tokens"), [(Limits(60, 0), 1), (Limits(600, 0), 1), (Limits(0, 60_000), 500)]
)
def test_three_routers_let_in_what_one_would(limits, num_tokens, bias, seed):
    """Ten times the limit is asked for: at most 5 % too much, and at most 5 % too little."""
    per_minute = limits.num_requests or limits.num_tokens // num_tokens
    allowed = 3 * per_minute  # a minute's worth at first, and two minutes

    num_in = Shared(3, limits, seed).play(120.0, per_minute / 6, num_tokens, bias)

    assert 0.95 * allowed <= num_in <= 1.05 * allowed


def test_routers_without_the_store_share_the_limit_by_their_number():
    routers = Shared(3, Limits(60, 0), 0).routers

    assert [num_let_in(router, 0.0) for router in routers] == [20, 20, 20]
    assert [num_let_in(router, 30.0) for router in routers] == [10, 10, 10]


@pytest.fixture(params=["6.2", "8.2"])
def server(request):
    with RedisServer(request.param) as server:
        yield server


async def test_the_script_does_what_its_twin_does(server):
    rng, twin = Random(7), SpendTwin()
    names, limits = ["x", "y", "z"], [60, 6_000, 600_000]
    async with open_store(server.url) as store:
        for _ in range(100):
            spent = [rng.choice([0.0, rng.uniform(-1, 2) * limit / 10]) for limit in limits]
            args: list[bytes | int] = []
            for part in zip(names, limits, spent, strict=True):
                args += (part[0].encode(), part[1], b"%.6f" % part[2])
            (seconds, micros) = server.client.time()
            before = seconds * 1_000_000 + micros

            levels = await store.call(scripts.SPEND, (b"{t}quota:",), args, 5.0)

            (seconds, micros) = server.client.time()
            elapsed_s = (seconds * 1_000_000 + micros - before) / 1e6
            for name, limit, amount, level in zip(names, limits, spent, levels, strict=True):
                expected = twin(before, name, limit, amount)
                inflow = limit / 60 * elapsed_s
                assert expected - 0.001 <= float(level) <= expected + inflow + 0.001
                if amount:  # from where the server is
                    text = server.client.get(f"{{t}}quota:{name}")
                    known, at = text.split()
                    twin.buckets[name] = float(known), int(at)


async def test_a_full_bucket_is_forgotten_and_nonsense_is_a_new_one(server):
    async with open_store(server.url) as store:
        key = b"{t}quota:x"
        await store.call(scripts.SPEND, (b"{t}quota:",), (b"x", 60, b"0"), 5.0)
        assert not server.client.exists(key)
        await store.call(scripts.SPEND, (b"{t}quota:",), (b"x", 60, b"1"), 5.0)
        assert 1000 < server.client.pttl(key) <= 2001
        await store.call(scripts.SPEND, (b"{t}quota:",), (b"x", 60, b"600"), 5.0)
        assert 590_000 < server.client.pttl(key) <= 602_001
        server.client.set(key, b"nonsense")
        levels = await store.call(scripts.SPEND, (b"{t}quota:",), (b"x", 60, b"1"), 5.0)
        assert levels == [b"59.000000"]


async def complete(router: Router, key: str, prompt: str = "p") -> tuple[int, Any, Any]:
    """Status, headers and body."""
    url = "http://{}:{}/v1/completions".format(*router.address)
    headers = {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.post(url, json={"model": "m", "prompt": prompt}) as answer:
            return answer.status, answer.headers, json.loads(await answer.read())


@pytest.fixture
def options(tmp_path, server):
    """Of routers that share these keys' limits."""
    secret, keys = Path(tmp_path / "secret"), Path(tmp_path / "keys")
    secret.write_text(SECRET)
    keys.write_text(f"{ALICES} alice rpm=30\n{BOBS} bob tpm=1000\n")
    return {"redis": server.url, "redis_secret_file": secret, "api_keys_file": keys}


@pytest.mark.e2e
async def test_three_real_routers_share_a_limit(options, start_router, replicas):
    options["api_keys_file"].write_text(f"{ALICES} alice rpm=240\n{BOBS} bob\n")
    routers = [await start_router(*replicas, **options) for _ in range(3)]
    shares = [router.service.access.quotas for router in routers]
    await until(lambda: [share.num_routers for share in shares] == [3, 3, 3])
    started = time.monotonic()
    statuses = []

    for number in range(480):
        status, headers, body = await complete(routers[number % 3], ALICE)
        statuses.append(status)
        if status == 429:
            assert 1 <= int(headers["retry-after"]) <= 60
            error = body["error"]
            assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
            assert "240 requests per minute" in error["message"]
        await asyncio.sleep(0.005)

    allowed = 240 + (time.monotonic() - started) * 4
    assert set(statuses) == {200, 429}
    assert 0.95 * 240 <= statuses.count(200) <= 1.05 * allowed
    assert (await complete(routers[0], BOB))[0] == 200  # a limit is one key's


async def test_what_was_spent_elsewhere_is_known_at_a_router_that_starts(
    options, start_router, replicas, server
):
    one = await start_router(*replicas, **options)
    while (await complete(one, ALICE))[0] == 200:
        pass
    key = ClusterSecret(SECRET.encode())
    bucket = key.prefix + b"quota:" + key.keyed_name("r:alice")
    await until(lambda: float(server.client.get(bucket).split()[0]) < 2)

    other = await start_router(*replicas, **options)

    statuses = [(await complete(other, ALICE))[0] for _ in range(10)]
    assert statuses.count(200) <= 3
    assert b"alice" not in b"".join(server.client.keys())


async def test_tokens_count_as_the_replica_counted_them(options, start_router, replicas):
    for fake in replicas:
        fake.prompt_tokens = 400
    router = await start_router(*replicas, **options)

    statuses = [(await complete(router, BOB))[0] for _ in range(5)]

    assert statuses == [200, 200, 200, 429, 429]  # 0, 400, 800: below 1,000


async def test_without_the_store_a_router_goes_on_with_its_part(
    options, start_router, replicas, server
):
    routers = [await start_router(*replicas, **options) for _ in range(3)]
    shares = [router.service.access.quotas for router in routers]
    await until(lambda: [share.num_routers for share in shares] == [3, 3, 3])
    server.kill()
    await until(lambda: not any(router.link.is_sharing for router in routers))

    statuses = [(await complete(routers[0], ALICE))[0] for _ in range(20)]

    assert 10 <= statuses.count(200) <= 12
    assert (await complete(routers[1], ALICE))[0] == 200


async def test_limits_hold_without_redis(options, start_router, replicas):
    router = await start_router(*replicas, api_keys_file=options["api_keys_file"])

    statuses = [(await complete(router, ALICE))[0] for _ in range(40)]

    assert 30 <= statuses.count(200) <= 33


async def test_what_no_replica_got_costs_nothing(options, start_router, replicas):
    router = await start_router(*replicas, api_keys_file=options["api_keys_file"])
    for fake in replicas:
        await fake.stop()

    statuses = {(await complete(router, ALICE))[0] for _ in range(40)}

    assert 429 not in statuses
