"""Tokenizer workers of a router: a bounded queue before them, and their lives.

    submit ─► waiting (newest first, bounded) ─► worker process ─► on_answer

Nothing waits for an answer: what is not tokenised is routed by its text, as well as the router
knows. So when workers are behind, the oldest job is dropped and counted; the newest prompts are
those whose next turn comes soonest. A worker that dies, or takes too long over one job, is started
again (restarts.py), and the job it had is dropped with it: it may be why.

Not here: what an answer is for (index/token_knowledge.py), the work itself (worker.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from roost_router.restarts import Backoff
from roost_router.tokens.wire import LENGTH, Answer, Hello, Job, pack

#: Jobs that wait for one worker, and the bytes of all that wait.
_MAX_WAITING: Final = 64
_MAX_WAITING_BYTES: Final = 16 << 20
#: Seconds after which a worker does not get ready any more, or is stuck in a job.
_START_S: Final = 60.0
_JOB_S: Final = 10.0

_log = logging.getLogger(__name__)

OnAnswer = Callable[[Job, Any, Answer], None]


class TokenizerStartError(Exception):
    """A worker cannot be started; the message says why and what to do."""


class TokenCounts:
    """What became of jobs and workers, since the start."""

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0  # answered with a reason why there are no tokens
        self.dropped = 0  # the workers were behind
        self.lost = 0  # with the worker that had them
        self.restarts = 0


class TokenService:
    """Worker processes that tokenise prompts for models whose tokenizer is given."""

    def __init__(
        self,
        tokenizers: Mapping[str, Path],
        on_answer: OnAnswer,
        *,
        num_workers: int = 1,
        job_s: float = _JOB_S,
    ) -> None:
        """`tokenizers`: folders by model. `on_answer(job, context, answer)`: called in the loop."""
        self.counts = TokenCounts()
        named = [f"{model}={folder}" for model, folder in tokenizers.items()]
        self._command = [sys.executable, "-P", "-m", "roost_router.tokens.worker", *named]
        # One thread each: the library would take every core.
        environment = os.environ  # noqa: TID251 - passed on, not read
        self._environment = {**environment, "TOKENIZERS_PARALLELISM": "false"}
        self._on_answer = on_answer
        self._num_workers = num_workers
        self._job_s = job_s
        self._waiting: deque[tuple[Job, Any]] = deque()
        self._num_bytes = 0
        self._has_jobs = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_waiting(self) -> int:
        """Jobs that no worker has taken yet."""
        return len(self._waiting)

    async def start(self) -> None:
        """Start the workers; returns when all are ready. TokenizerStartError."""
        ready = [asyncio.get_running_loop().create_future() for _ in range(self._num_workers)]
        self._tasks = [asyncio.create_task(self._keep(future)) for future in ready]
        try:
            outcomes = await asyncio.gather(*ready, return_exceptions=True)
        except BaseException:
            await self.stop()
            raise
        failures = [outcome for outcome in outcomes if outcome is not None]
        if failures:
            await self.stop()
            raise failures[0]

    async def stop(self) -> None:
        """End the workers. Nothing is answered any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def submit(self, job: Job, context: Any = None) -> None:
        """Queue a job; never waits. Where there is no room the oldest is dropped."""
        if len(job.body) > _MAX_WAITING_BYTES:
            self.counts.dropped += 1
            return
        waiting = self._waiting
        waiting.append((job, context))
        self._num_bytes += len(job.body)
        most = _MAX_WAITING * self._num_workers
        while len(waiting) > most or self._num_bytes > _MAX_WAITING_BYTES:
            oldest, _ = waiting.popleft()
            self._num_bytes -= len(oldest.body)
            self.counts.dropped += 1
        self._has_jobs.set()

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """Keep one worker running."""
        backoff = Backoff()
        while True:
            started_at = time.monotonic()
            try:
                await self._serve_with_worker(ready)
            except TokenizerStartError as error:
                if not ready.done():
                    ready.set_exception(error)
                    return
                _log.warning("a tokenizer worker does not start: %s", error)
            # Whatever ends one worker must not end the tokenising of all that comes.
            except Exception as error:  # noqa: BLE001
                if not ready.done():
                    ready.set_exception(TokenizerStartError(_NO_HELLO))
                    return
                _log.warning("a tokenizer worker ended (%r); it is started again", error)
            self.counts.restarts += 1
            await asyncio.sleep(backoff.delay_s(time.monotonic() - started_at))

    async def _serve_with_worker(self, ready: asyncio.Future[None]) -> None:
        """Start a worker and give it jobs until it fails."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_S):
                hello = msgspec.msgpack.decode(await _read(process.stdout), type=Hello)
            if hello.error:
                raise TokenizerStartError(hello.error)
            if not ready.done():
                ready.set_result(None)
            while True:
                await self._do_one(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _do_one(self, process: asyncio.subprocess.Process) -> None:
        jobs, answers = process.stdin, process.stdout
        assert jobs is not None
        assert answers is not None
        while not self._waiting:
            self._has_jobs.clear()
            await self._has_jobs.wait()
        if process.returncode is not None:
            raise ConnectionError(f"it ended with status {process.returncode}")
        job, context = self._waiting.pop()
        self._num_bytes -= len(job.body)
        try:
            async with asyncio.timeout(self._job_s):
                jobs.write(pack(job))
                await jobs.drain()
                answer = msgspec.msgpack.decode(await _read(answers), type=Answer)
        except BaseException:
            self.counts.lost += 1
            raise
        if answer.error:
            self.counts.failed += 1
        else:
            self.counts.answered += 1
        self._on_answer(job, context, answer)


_NO_HELLO: Final = (
    "it ended before it was ready (see above); tokenising needs the extra: "
    "pip install 'roost[tokens]'"
)


async def _read(stream: asyncio.StreamReader) -> bytes:
    length = LENGTH.unpack(await stream.readexactly(LENGTH.size))[0]
    return await stream.readexactly(length)
