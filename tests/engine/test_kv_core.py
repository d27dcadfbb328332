"""KV events on their way from the engine thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from fake_model import FakeModel
from resident_set import ResidentSet

from roost_engine.batch import Chunk
from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.core import EngineCore
from roost_engine.kv_log import KvEventLog
from roost_engine.kv_teller import KvTeller
from roost_engine.request import Request, SamplingParams
from roost_engine.scheduler import Scheduler
from roost_wire.kv_events import AllBlocksCleared, KvEventBatch
from roost_wire.told_load import ToldLoad


class Told:
    """A core, and what its teller told; on which thread."""

    def __init__(self, runner: FakeModel | None = None) -> None:
        log = KvEventLog(epoch=1)
        self.teller = KvTeller(log)
        self.teller.on_batch, self.teller.on_snapshot = self._on_batch, self._on_snapshot
        self.pool = BlockPool(24, 4, on_event=log.append)
        config = SchedulerConfig(max_step_tokens=16, max_running=4, max_model_len=90)
        scheduler = Scheduler(config, self.pool, frozenset())
        self.core = EngineCore(scheduler, runner or FakeModel(block_size=4), kv_teller=self.teller)
        self.batches: list[KvEventBatch] = []
        self.snapshots: list[KvEventBatch] = []
        self.threads: set[int] = set()

    def _on_batch(self, batch: KvEventBatch) -> None:
        self.batches.append(batch)
        self.threads.add(threading.get_ident())

    def _on_snapshot(self, batch: KvEventBatch) -> None:
        self.snapshots.append(batch)

    async def complete(self, prompt: list[int]) -> None:
        sampling = SamplingParams(max_tokens=5, temperature=0.0)
        async for _ in self.core.submit(Request(str(prompt), prompt, sampling, 0.0)):
            pass

    def follow(self, batches: list[KvEventBatch]) -> ResidentSet:
        follower = ResidentSet()
        for batch in batches:
            for event in batch.events:
                follower.apply(event)
        return follower


async def test_what_steps_did_is_told_on_the_loop_and_a_snapshot_whenever_asked() -> None:
    told = Told()
    told.core.start()
    for first in range(12):  # more than fits: blocks are evicted
        await told.complete(list(range(first, first + 20)))
    told.core.ask_kv_snapshot()  # nothing else would wake the thread now
    async with asyncio.timeout(20):
        while not told.snapshots:
            await asyncio.sleep(0.01)
    await told.core.stop()

    assert [batch.sequence for batch in told.batches] == list(range(len(told.batches)))
    assert told.threads == {threading.get_ident()}
    told.follow(told.batches).check_equals(told.pool)
    (snapshot,) = told.snapshots
    assert snapshot.events[0] == AllBlocksCleared()
    told.follow([snapshot]).check_equals(told.pool)


async def test_an_idle_engine_sends_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("core", "kv_teller"):
        monkeypatch.setattr(f"roost_engine.{module}.HEARTBEAT_S", 0.02)
    told = Told()
    told.core.start()
    async with asyncio.timeout(20):
        while len(told.batches) < 2:
            await asyncio.sleep(0.01)
    await told.core.stop()

    assert [batch.events for batch in told.batches[:2]] == [[], []]


class SlowModel(FakeModel):
    """Computes nothing until it may."""

    def __init__(self) -> None:
        super().__init__(block_size=4)
        self.may_compute = threading.Event()

    def forward(self, chunks: Sequence[Chunk]) -> npt.NDArray[np.float32]:
        assert self.may_compute.wait(20)
        return super().forward(chunks)


async def test_who_is_started_is_told_before_the_step_and_who_ended_after_it() -> None:
    model = SlowModel()
    told = Told(model)
    told.core.start()
    first = asyncio.ensure_future(told.complete(list(range(20))))

    async def until_told(load: ToldLoad) -> None:
        async with asyncio.timeout(20):
            while not told.batches or told.batches[-1].load != load:
                await asyncio.sleep(0.01)

    await until_told(ToldLoad(1, 0, 20, 96, 20))
    assert told.core.load == told.batches[-1].load
    second = asyncio.ensure_future(told.complete(list(range(12))))
    await asyncio.sleep(0)
    assert told.core.load == ToldLoad(1, 1, 20, 96, 32)  # on its way to the scheduler
    model.may_compute.set()
    await asyncio.gather(first, second)
    await until_told(ToldLoad(0, 0, 0, 96, 0))
    await told.core.stop()
