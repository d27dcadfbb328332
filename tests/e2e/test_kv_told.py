"""What engines tell beside their KV events: digests that show what got lost, and their load."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import pytest
from kv_fault_proxy import KvFaultProxy
from kv_fleet import EVENTS, ask, trusts, would_go
from processes import Process, get, make_client, start_engine, start_router, until
from tokenizer_folders import smollm2_folder

#: No poll comes between: what is seen was told.
NO_POLLS = ("--poll-interval", "3600")
LONG = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
#: For four long answers at once.
ROOM = ("--kv-tokens", "8192", "--max-model-len", "2048")


@pytest.fixture
def engines():
    engines = [start_engine(*EVENTS, *ROOM), start_engine(*EVENTS, *ROOM)]
    yield engines
    for engine in engines:
        assert engine.stop() == 0


def model_of(engine: Process) -> str:
    return make_client(engine.url).models.list().data[0].id


def tokenizer(engine: Process) -> tuple[str, str]:
    return "--tokenizer", f"{model_of(engine)}={smollm2_folder()}"


def losses(admin: str) -> dict[str, float]:
    """By replica and reason."""
    pattern = r'^roost_router_kv_losses_total\{reason="(\w+)",replica="(\w+)"\} (\S+)$'
    found = re.findall(pattern, get(f"{admin}/metrics"), re.MULTILINE)
    return {f"{replica} {reason}": float(count) for reason, replica, count in found}


def findings(admin: str) -> list[str]:
    return [found["what"] for found in json.loads(get(f"{admin}/fleet"))["findings"]]


def reported(admin: str) -> list[tuple[int, int]]:
    """How many requests run and wait on each replica, as far as the router knows."""
    rows = json.loads(get(f"{admin}/fleet"))["replicas"]
    return [(row["reported"]["num_running"], row["reported"]["num_waiting"]) for row in rows]


@contextlib.contextmanager
def streams(engine: Process, count: int) -> Iterator[None]:
    """So many long answers, running: each has shown a token."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(make_client(engine.url))
        model = model_of(engine)
        for number in range(count):
            prompt = f"Number {number} is"
            answer = client.completions.create(model=model, prompt=prompt, stream=True, **LONG)
            next(iter(stack.enter_context(answer)))
        yield


def test_events_that_got_lost_without_a_gap_are_noticed_and_learnt_anew(engines):
    proxies = [KvFaultProxy(engine.url) for engine in engines]
    model = model_of(engines[0])
    router, admin = start_router(*proxies, options=(*tokenizer(engines[0]), *NO_POLLS))
    try:
        until(lambda: trusts(admin) == [["exact"], ["exact"]])
        _, headers = ask(router, model, "mill", "Who grinds?")
        home = headers["x-roost-replica"]
        (other,) = {"r0", "r1"} - {home}
        ask(router, model, "mill", "Who grinds, and where?")  # now that a block's size is known
        until(lambda: would_go(admin, model, "mill", "Why?")["rows"][home]["is_told"])
        assert would_go(admin, model, "mill", "Why?")["rows"][other]["matched_tokens"] == 0
        assert losses(admin) == {}

        proxy = proxies[int(other[1])]
        proxy.empty_next()
        ask(engines[int(other[1])], model, "mill", "Who grinds?")
        until(lambda: losses(admin) == {f"{other} digest": 1})
        until(lambda: trusts(admin) == [["exact"], ["exact"]])
        mended = would_go(admin, model, "mill", "Why?")["rows"][other]

        assert proxy.num_emptied == 1
        assert mended["is_told"]
        assert mended["matched_tokens"] > 500
        assert findings(admin) == ["KV events of rank 0 did not add up once; it was learnt anew"]
        assert losses(admin) == {f"{other} digest": 1}
    finally:
        assert router.stop() == 0
        for proxy in proxies:
            proxy.close()


def test_what_is_placed_behind_a_routers_back_is_seen_without_asking(engines):
    router, admin = start_router(*engines, options=(*tokenizer(engines[0]), *NO_POLLS))
    try:
        until(lambda: trusts(admin) == [["exact"], ["exact"]])
        with streams(engines[1], 3):
            until(lambda: reported(admin) == [(0, 0), (3, 0)])
            assert would_go(admin, model_of(engines[0]), "mill", "Why?")["replica"] == "r0"
        until(lambda: reported(admin) == [(0, 0), (0, 0)])
    finally:
        assert router.stop() == 0


def test_without_events_an_answer_tells_what_else_is_going_on_there():
    engine = start_engine(*ROOM)
    router, admin = start_router(engine, options=NO_POLLS)
    model = model_of(engine)
    try:
        with streams(engine, 2):
            assert reported(admin) == [(0, 0)]  # nobody has told
            _, headers = ask(router, model, "mill", "Who grinds?", 60)
            assert reported(admin) == [(2, 0)]
            with make_client(router.url) as client:
                raw = client.completions.with_raw_response.create(
                    model=model, prompt="One is", stream=True, **LONG
                )
                next(iter(answer := raw.parse()))
                assert reported(admin) == [(3, 0)]
                answer.close()
            assert not [name for name in (*headers, *raw.headers) if name == "x-roost-load"]
    finally:
        assert router.stop() == 0
        assert engine.stop() == 0
