"""Stores before real servers, for tests; what each was told of its state."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha1
from typing import NamedTuple

import pytest

from roost_router.store.address import parse_address
from roost_router.store.client import Store
from roost_router.store.errors import StoreError, StoreFault

PROBE = b"roost:{t}:probe"


class Told(NamedTuple):
    """A change that `on_change` was told."""

    is_up: bool
    why: str


class Lua(NamedTuple):
    """A script of a test."""

    source: str

    @property
    def sha(self) -> str:
        return sha1(self.source.encode()).hexdigest()


@contextlib.asynccontextmanager
async def open_store(
    url: str, told: list[Told] | None = None, **options: str
) -> AsyncIterator[Store]:
    """A store that has been started; up, if its server is."""
    changes = told if told is not None else []
    store = Store(
        parse_address(url, **options),
        lambda is_up, why: changes.append(Told(is_up, why)),
        probe_key=PROBE,
    )
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for `condition`; fails the test when it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def fault_of(call: Awaitable[object], budget_s: float) -> StoreFault:
    """What a call fails with; fails the test where it succeeds or forgets its budget.

    The bound is generous: a machine that is busy with other tests keeps none to the millisecond.
    """
    started = asyncio.get_running_loop().time()
    with pytest.raises(StoreError) as caught:
        await call
    assert asyncio.get_running_loop().time() - started < 10 * budget_s + 1
    return caught.value.fault


async def until_works(store: Store, key: bytes = b"roost:{t}:again") -> None:
    """Wait until a value is written and read again."""

    async def works() -> bool:
        try:
            await store.set(key, b"yes", 60)
            return await store.get(key) == b"yes"
        except StoreError:
            await asyncio.sleep(0.02)
            return False

    async with asyncio.timeout(30):
        while not await works():
            pass
