"""The fault matrix: what clients lose when one of two replicas fails, router by router.

Every cell is a fresh router over two replicas of this process, A and B. A fails every request in
the row's way while its health checks stay green; B is sound. `requests` streams are asked for,
`concurrency` at a time, each with a prompt of its own. A request is lost unless its client gets
the whole answer (fault_answer.py). With `both`, A and B fail every third request instead: nobody
can be avoided, and a resumed stream may be struck again. In the last rows the client is the one
who leaves, before the first token; counted is how many replicas notice in time.

Not here: how a replica fails (fault_replica.py), the table (fault_table.py).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from roost_loadtest.fault_answer import Verdict
from roost_loadtest.fault_client import Client, Outcome, at_once
from roost_loadtest.fault_replica import Fault, FaultyReplica
from roost_loadtest.fault_routers import RouterKind, RunningRouter, start_router
from roost_loadtest.fault_words import Dialect, expected, request_body

#: The rows in which a request can be lost.
FAULTS = tuple(fault for fault in Fault if fault is not Fault.NONE)

_START_S = 30.0
_LEAVERS = 3
#: Where a replica is silent when its client leaves; vLLM's sends its head before any token.
LEAVING = {Fault.HANG_PRE: "before headers", Fault.HANG_HEAD: "after headers"}
_LEAVE_AFTER_S = 0.3
_SOON_S, _LATE_S = 0.05, 1.0


class Column(msgspec.Struct, frozen=True):
    """A router in front of replicas that speak `dialect`."""

    title: str
    kind: RouterKind
    dialect: Dialect


class Cell(msgspec.Struct, frozen=True):
    """A fault behind a router."""

    router: str
    fault: str
    requests: int
    lost: int
    kinds: dict[str, int]  # how the lost ones ended
    hits: int  # requests that A failed: 0 proves nothing
    slowest_s: float
    examples: list[str]


class Leaving(msgspec.Struct, frozen=True):
    """Clients that leave before the first token."""

    router: str
    silent: str  # where the replica is
    clients: int
    seen_soon: int  # replica saw its connection close within 50 ms
    seen_late: int  # within 1 s
    delays_ms: list[float]


class MatrixConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench faults`."""

    requests: int = 24
    concurrency: int = 4
    tokens: int = 20  # of an answer
    patience_s: float = 6.0  # a client that sees no event for so long calls it a hang
    faults: tuple[Fault, ...] = FAULTS
    has_leaving: bool = True
    both: bool = False  # A and B fail every third request, instead of A every one


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured."""

    config: MatrixConfig
    routers: dict[str, str]  # title to version
    cells: list[Cell]
    leaving: list[Leaving]


async def run_matrix(
    columns: Sequence[Column], config: MatrixConfig, progress: Callable[[str], None]
) -> Matrix:
    """Every column through every row. PeerError if a router does not start."""
    cells, leaving = [], []
    with tempfile.TemporaryDirectory() as folder:
        for column in columns:
            for fault in config.faults:
                cell = await _cell(column, fault, config, Path(folder))
                progress(f"{column.title}: {fault.value}: {cell.lost} lost, {cell.hits} hits")
                cells.append(cell)
            if config.has_leaving:
                for fault in LEAVING:
                    leaving.append(await _leaving(column, fault, config, Path(folder)))
                    progress(f"{column.title}: client leaves: {leaving[-1].delays_ms} ms")
    versions = {column.title: column.kind.version for column in columns}
    return Matrix(config=config, routers=versions, cells=cells, leaving=leaving)


async def _cell(column: Column, fault: Fault, config: MatrixConfig, folder: Path) -> Cell:
    async with _Scene(column, config, folder) as scene:
        faulty = scene.replicas[: 2 if config.both else 1]
        for replica in faulty:
            replica.every = 3 if config.both else 1
            replica.fault = fault
        if fault is Fault.DEAD:
            await faulty[0].stop()
        calls = [partial(scene.ask, f"{fault.value} request {n}") for n in range(config.requests)]
        outcomes = await at_once(calls, config.concurrency)
        hits = sum(replica.num_hits for replica in faulty)
    lost = [outcome for outcome in outcomes if outcome.verdict is not Verdict.OK]
    return Cell(
        router=column.title,
        fault=fault.value,
        requests=config.requests,
        lost=len(lost),
        kinds=dict(Counter(_kind(outcome) for outcome in lost)),
        hits=hits,
        slowest_s=round(max(outcome.ended_at - outcome.sent_at for outcome in outcomes), 3),
        examples=sorted({outcome.detail for outcome in lost})[:3],
    )


async def _leaving(column: Column, fault: Fault, config: MatrixConfig, folder: Path) -> Leaving:
    """Clients go one after the other, while their replica is still silent."""
    delays = []
    async with _Scene(column, config, folder) as scene:
        for replica in scene.replicas:
            replica.fault = fault
        for number in range(_LEAVERS):
            before = sum(len(replica.aborted_at) for replica in scene.replicas)
            outcome = await scene.ask(f"leaver {number}", leave_after_s=_LEAVE_AFTER_S)
            deadline = time.monotonic() + _LATE_S
            while time.monotonic() < deadline:
                seen = [at for replica in scene.replicas for at in replica.aborted_at]
                if len(seen) > before:
                    delays.append(max(0.0, max(seen) - outcome.ended_at))
                    break
                await asyncio.sleep(0.005)
    return Leaving(
        router=column.title,
        silent=LEAVING[fault],
        clients=_LEAVERS,
        seen_soon=sum(delay <= _SOON_S for delay in delays),
        seen_late=len(delays),
        delays_ms=[round(delay * 1e3, 1) for delay in delays],
    )


class _Scene:
    """Two replicas and a router over them that has served both."""

    def __init__(self, column: Column, config: MatrixConfig, folder: Path) -> None:
        self._column = column
        self._config = config
        self._folder = folder
        self._router: RunningRouter | None = None
        self.replicas: list[FaultyReplica] = []

    async def __aenter__(self) -> _Scene:
        """Start all; PeerError if the router does not serve both replicas in time."""
        try:
            for _ in range(2):
                self.replicas.append(await FaultyReplica(self._column.dialect).start())
            urls = [replica.url for replica in self.replicas]
            self._router = start_router(self._column.kind, urls, self._folder)
            await self._until_serving(self._router)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all."""
        if self._router is not None:
            self._router.end()
        for replica in self.replicas:
            await replica.stop()

    async def ask(self, prompt: str, leave_after_s: float | None = None) -> Outcome:
        """One streamed request through the router, judged."""
        assert self._router is not None
        count = self._config.tokens
        # Resumed by text, an engine counts the text that it was given as its prompt.
        exact = self._column.dialect == "roost"
        return await Client(self._router.port).ask(
            request_body(prompt, count),
            expected(prompt, count, exact_usage=exact),
            patience_s=self._config.patience_s,
            leave_after_s=leave_after_s,
        )

    async def _until_serving(self, router: RunningRouter) -> None:
        """Ask until both replicas have answered: health checks and discovery are done."""
        deadline = time.monotonic() + _START_S
        number, said = 0, "nothing"
        while not all(replica.num_requests for replica in self.replicas):
            if router.group.popen.poll() is not None:
                raise router.group.failed("has ended")
            if time.monotonic() > deadline:
                raise router.group.failed(f"does not use both replicas; the last answer: {said}")
            outcome = await self.ask(f"warm-up {number}")
            number += 1
            if outcome.verdict is not Verdict.OK:
                said = f"{outcome.verdict.value} {outcome.detail}"
                await asyncio.sleep(0.1)


def _kind(outcome: Outcome) -> str:
    name = outcome.verdict.value
    return f"{outcome.status}" if outcome.verdict is Verdict.STATUS else name
