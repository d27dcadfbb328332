"""A model split over processes of this machine: rank 0's side. Starts followers, hands out steps.

    rank 0 (this process)                        follower (parallel_follower.py), one each
    ---------------------                        -----------------------------------------
    stdin pipe:  Start, then each Step           -> computes its part of each step
    stdout pipe: one byte when it can connect, one when its weights are ready
    gloo:        hidden states, sums, logits     (parallel_stage.py)

The stdin pipe is the lifeline: its end, however rank 0 ended, ends the follower at once. A
follower that ends ends the step that waits for it: `forward` raises ParallelError, and the
engine, which computes nothing any more, fails its requests and exits.

Not here: what is split how (parallel_plan.py, models/layer.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from struct import Struct
from typing import Final, Literal

import msgspec
import torch

from roost_engine.batch import BlockCopy, Chunk
from roost_engine.config import CacheConfig
from roost_engine.loader import LoadedModel
from roost_engine.parallel_plan import ParallelPlan
from roost_engine.parallel_stage import Links, StageRunner, open_store

DTypeName = Literal["float32", "bfloat16"]

_LENGTH: Final = Struct("<I")
LOST_OTHERS: Final = 3  # exit status of a follower whose neighbour is gone
_GRACE_S: Final = 5.0  # a follower has nothing to finish; it ends when its pipe does


class ParallelError(Exception):
    """A follower ended; this model computes nothing any more."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """First message to a follower."""

    source: str
    cache: CacheConfig
    dtype: DTypeName
    plan: ParallelPlan
    rank: int
    port: int  # of the store, on the loopback interface
    num_threads: int | None


class Step(msgspec.Struct, frozen=True):
    """Every later message: orders of the host tier, then chunks; see batch.py."""

    copies: Sequence[BlockCopy] = ()
    chunks: Sequence[Chunk] = ()


def read_frame(fd: int) -> bytes | None:
    """The next message; None at the end of the pipe, even inside a message."""
    head = _read_exactly(fd, _LENGTH.size)
    return None if head is None else _read_exactly(fd, _LENGTH.unpack(head)[0])


def _read_exactly(fd: int, num_bytes: int) -> bytes | None:
    parts: list[bytes] = []
    while num_bytes:
        part = os.read(fd, num_bytes)
        if not part:
            return None
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


class ParallelRunner:
    """ModelRunner's counterpart for a split model; same `forward`, plus `close`.

    Starting takes as long as the slowest process takes to convert its part. ValueError for a
    plan that does not fit the model, ParallelError if a follower cannot start.
    """

    def __init__(
        self,
        source: str,
        model: LoadedModel,
        cache: CacheConfig,
        dtype: DTypeName,
        *,
        plan: ParallelPlan,
        num_threads: int | None = None,
    ) -> None:
        """`source` is what `model` was loaded from: followers load it again, for themselves.

        `num_threads`: of each follower; None leaves it to torch.
        """
        plan.check(model.config)
        self._vocab_size = model.config.vocab_size
        self._problem: str | None = None
        self._store = open_store(plan, 0)
        start = Start(
            source=source,
            cache=cache,
            dtype=dtype,
            plan=plan,
            rank=0,
            port=self._store.port,
            num_threads=num_threads,
        )
        self._followers = [
            _Follower(msgspec.structs.replace(start, rank=rank))
            for rank in range(1, plan.num_processes)
        ]
        try:
            self._wait_for_followers()
            links = Links(plan, 0, self._store)
            self._stage = StageRunner(model, cache, getattr(torch, dtype), links)
            self._wait_for_followers()
        except BaseException:
            self.close()
            raise

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """See ModelRunner.forward. ParallelError, for this call and all later, if one is gone."""
        if not chunks:
            return torch.empty(0, self._vocab_size)
        layout = self._stage.lay_out(chunks)
        self._tell_all(Step(chunks=chunks))
        try:
            return self._stage.compute(layout)
        except RuntimeError as error:  # gloo's
            raise self._failed(error) from error

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out a host tier's orders, each process on its part. ParallelError as above."""
        self._tell_all(Step(copies=copies))
        self._stage.copy_blocks(copies)

    def _tell_all(self, step: Step) -> None:
        if self._problem is not None:
            raise ParallelError(self._problem)
        frame = msgspec.msgpack.encode(step)
        try:
            for follower in self._followers:
                follower.tell(frame)
        except OSError as error:  # a broken pipe
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ParallelError:
        """End the rest; the error for this call and all later ones."""
        lost = f"the processes of the model lost each other: {error}"
        self._problem = self._who_ended() or lost
        self.close()
        return ParallelError(self._problem)

    def close(self) -> None:
        """End the followers; returns when they have ended. May be called again."""
        for follower in self._followers:
            follower.end()
        for follower in self._followers:
            follower.wait()

    def _wait_for_followers(self) -> None:
        for follower in self._followers:
            if not follower.is_ready():
                raise ParallelError(self._who_ended() or "a follower did not start")

    def _who_ended(self) -> str | None:
        """Which follower ended: the cause, not who lost it. It may take a moment to end."""
        deadline = time.monotonic() + _GRACE_S
        while True:
            ended = [
                (status == LOST_OTHERS, follower.rank, status)
                for follower in self._followers
                if (status := follower.status()) is not None
            ]
            is_cause_known = any(not lost for lost, _, _ in ended)
            if is_cause_known or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if not ended:
            return None
        _, rank, status = min(ended)
        return f"process {rank} of the model ended with status {status}; see its message above"


class _Follower:
    """A child process and its two pipes."""

    def __init__(self, start: Start) -> None:
        self.rank = start.rank
        # A session of its own: an interrupt from the terminal is for rank 0 to handle.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "roost_engine.parallel_follower"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.tell(msgspec.msgpack.encode(start))

    def tell(self, body: bytes) -> None:
        """Send a message; BrokenPipeError if the follower is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(_LENGTH.pack(len(body)) + body)
        self._process.stdin.flush()

    def is_ready(self) -> bool:
        """Wait for its next byte; False if it ended instead."""
        assert self._process.stdout is not None
        return bool(self._process.stdout.read(1))

    def status(self) -> int | None:
        """Exit status; None if it has not ended."""
        return self._process.poll()

    def end(self) -> None:
        """Cut its lifeline."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:  # unsent bytes for a follower that is gone
            return

    def wait(self) -> None:
        """Until it has ended; killed if it does not."""
        assert self._process.stdout is not None
        try:
            self._process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
