"""The wish to report reused blocks, put into bodies as clients sent them."""

from __future__ import annotations

import json

import aiohttp
import pytest

from roost_router.kv.report_mode import ask_for_reuse

PATH = b"/v1/completions"


@pytest.mark.parametrize("space", ["", " ", "\n\t "])
def test_the_wish_is_added_and_all_else_is_as_it_was(space):
    fields = {"model": "m", "messages": [{"role": "user", "content": 'braces { and "quotes"'}]}
    body = space.encode() + json.dumps(fields).encode() + b"\n"

    asked = ask_for_reuse(PATH, body)

    wish = {"vllm_xargs": {"kv_cache_report_mode": "full"}}
    assert json.loads(asked) == {**wish, **fields}
    assert asked.endswith(body.lstrip()[1:])


def test_arguments_of_the_client_stay_as_they_are():
    body = b'{"model": "m", "vllm_xargs": {"mine": 1}, "prompt": "x"}'

    assert ask_for_reuse(PATH, body) == body


def test_what_is_no_object_stays_as_it_is():
    assert ask_for_reuse(PATH, b"") == b""
    assert ask_for_reuse(PATH, b"[1]") == b"[1]"


def test_embeddings_stay_as_they_are():
    body = b'{"model": "m", "input": "x"}'

    assert ask_for_reuse(b"/v1/embeddings", body) == body


class _Follower:
    """Says that the first replica is to report what it reuses."""

    reseeding = frozenset({"r0"})

    def status(self) -> list[object]:
        return []


async def test_only_replicas_that_lost_events_are_asked(start_router, replicas):
    router = await start_router(*replicas)
    router.service.follower = _Follower()
    url = "http://{}:{}/v1/completions".format(*router.address)
    async with aiohttp.ClientSession() as session:
        for number in range(8):
            body = {"model": "m", "prompt": f"{number} words " * 200}
            async with session.post(url, json=body) as answer:
                assert answer.status == 200

    lost, sound = (list(map(json.loads, replica.bodies)) for replica in replicas)
    assert lost
    assert sound
    assert all(body["vllm_xargs"] == {"kv_cache_report_mode": "full"} for body in lost)
    assert not any("vllm_xargs" in body for body in sound)
