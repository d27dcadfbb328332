"""What tests ask of a router that runs in the same process: completions, and its admin port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from roost_router.app import Router
from roost_router.fleet_page import FleetPage

PROMPT = "the same words again and again. " * 100


def admin_url(router: Router) -> str:
    """Where its admin port is."""
    return "http://{}:{}".format(*router.admin_address)


async def complete(router: Router, prompt: str = PROMPT, **more: Any) -> int:
    """Status of a completion by model "m", read to its end."""
    url = "http://{}:{}/v1/completions".format(*router.address)
    async with aiohttp.ClientSession() as session:
        async with session.post(url, json={"model": "m", "prompt": prompt, **more}) as answer:
            await answer.read()
            return answer.status


async def get(router: Router, path: str, key: str | None = None) -> tuple[int, bytes, Any]:
    """Status, body and headers of a page of its admin port."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.get(admin_url(router) + path) as answer:
            return answer.status, await answer.read(), answer.headers


async def fleet(router: Router) -> FleetPage:
    """Its page /fleet."""
    status, page, _ = await get(router, "/fleet")
    assert status == 200
    return msgspec.json.decode(page, type=FleetPage)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for `condition`; fails the test when it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
