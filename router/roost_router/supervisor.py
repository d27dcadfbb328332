"""Holds the listening sockets and changes the processes behind them: `roost route --processes N`.

    supervisor ─┬─ data socket 0, admin socket 0 ──► worker 0   `roost route` once more, which
                ├─ data socket 1, admin socket 1 ──► worker 1   inherits its slot's two sockets
                ┆

The sockets stay open for as long as the supervisor lives, so a connection that waits to be
accepted outlives the worker that would have accepted it. A worker says what it does through a pipe:

    a byte     it knows its replicas and accepts
    the end    it accepts no more: it drains, or it is dead

Replacing a worker (SIGHUP: each slot in turn): its successor starts on the same sockets; once that
accepts, the old worker is told to stop (SIGUSR2) and serves out what it has. Whoever stops
accepting unasked is succeeded at once. SIGTERM or SIGINT: all workers drain, then we end.

Nothing outlives us: workers lead their own sessions, so that Ctrl-C reaches only this process, and
each holds the read end of a pipe (its lifeline) that ends when we do, however we do.

Invariants: a slot has at most one worker that accepts and one that is about to. Not here: requests,
configuration (a worker reads its options itself), memory: no asyncio, no HTTP, 17 MB.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from math import inf

from roost_router.config import RouterConfig
from roost_router.listening import BACKLOG, REPLACED, bind, bind_group, inherited
from roost_router.restarts import Backoff

#: Seconds until a worker that does not get ready, or does not end, is killed.
_START_S = 60.0
_SPARE_S = 5.0
_log = logging.getLogger(__name__)


class SupervisorError(Exception):
    """The workers cannot be started; they have said why."""


class _Worker:
    """One process."""

    def __init__(self, slot: _Slot, process: subprocess.Popen[bytes], status_fd: int) -> None:
        now = time.monotonic()
        self.slot = slot
        self.process = process
        self.status_fd = status_fd
        self.started_at = now
        self.is_ready = False
        self.is_leaving = False  # was told to end
        self.kill_at = now + _START_S

    def __str__(self) -> str:
        return f"worker {self.slot.number} (process {self.process.pid})"


class _Slot:
    """Two sockets and whoever serves them."""

    def __init__(self, number: int, data: socket.socket, admin: socket.socket) -> None:
        self.number = number
        self.data = data
        self.admin = admin
        self.worker: _Worker | None = None  # accepts, or will as the first of this slot
        self.successor: _Worker | None = None  # starts, to take over from `worker`
        self.backoff = Backoff()
        self.start_at = inf  # when the next worker is due


class Supervisor:
    """Workers of one router, from the first start to the last end."""

    def __init__(self, config: RouterConfig, command: Sequence[str]) -> None:
        """Opens all sockets. `command`: a worker's, but for its descriptors. Raises ConfigError."""
        self._command = list(command)
        self._leave_s = config.drain_delay_s + config.drain_s + _SPARE_S
        self._slots = [_Slot(*numbered) for numbered in _sockets(config)]
        self._workers: set[_Worker] = set()
        self._to_replace: list[_Slot] = []
        self._has_started = False  # all workers were ready once
        self._is_stopping = False
        self._failure = ""
        self._selector = selectors.DefaultSelector()
        self._lifeline, self._our_end = os.pipe()
        if config.lifeline_fd is not None:
            self._selector.register(config.lifeline_fd, selectors.EVENT_READ, self._orphaned)

    def run(self) -> None:
        """Serve until a signal or the end of our own lifeline. Raises SupervisorError."""
        self._catch_signals()
        for slot in self._slots:
            slot.worker = self._start(slot)
        while self._workers or not self._is_stopping:
            for key, _ in self._selector.select(self._wait_s()):
                key.data(key.fd)
            self._reap()
            self._look_at_time()
        if self._failure:
            raise SupervisorError(self._failure)

    # what happens

    def _catch_signals(self) -> None:
        """Turn signals into bytes that `select` wakes up for."""
        wakeup, write_end = os.pipe()
        os.set_blocking(wakeup, False)
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._selector.register(wakeup, selectors.EVENT_READ, self._signalled)

    def _signalled(self, wakeup: int) -> None:
        numbers = os.read(wakeup, 4096)
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._stop()
        elif signal.SIGHUP in numbers and not self._is_stopping:
            _log.info("replacing %d workers", len(self._slots))
            self._to_replace = list(self._slots)
            if self._has_started:
                self._replace_next()

    def _orphaned(self, lifeline: int) -> None:
        self._selector.unregister(lifeline)
        self._stop()

    def _told(self, worker: _Worker) -> None:
        """A worker's pipe has something to read."""
        if os.read(worker.status_fd, 1):
            worker.is_ready, worker.kill_at = True, inf
            self._became_ready(worker)
        else:
            self._selector.unregister(worker.status_fd)
            os.close(worker.status_fd)
            self._stopped_accepting(worker)

    def _became_ready(self, worker: _Worker) -> None:
        slot = worker.slot
        if self._is_stopping:
            return
        if worker is slot.successor:
            old, slot.worker, slot.successor = slot.worker, worker, None
            if old is not None:
                self._tell(old, REPLACED)
            _log.info("%s took over from %s", worker, old)
            self._replace_next()
        elif not self._has_started and all(s.worker and s.worker.is_ready for s in self._slots):
            self._has_started = True
            addresses = (_address(worker.slot.data), _address(self._slots[0].admin))
            _log.info("%d workers are ready on %s, admin on %s", len(self._slots), *addresses)
            self._replace_next()

    def _stopped_accepting(self, worker: _Worker) -> None:
        slot = worker.slot
        if self._is_stopping:
            return
        if not self._has_started:
            self._failure = f"{worker} ended before it was ready"
            self._stop()
        elif worker is slot.successor:
            slot.successor = None
            self._to_replace.clear()
            _log.error("%s ended before it was ready: the workers stay what they were", worker)
        elif worker is slot.worker:
            slot.worker = None
        if slot.worker is slot.successor is None and not self._is_stopping:
            now = time.monotonic()
            slot.start_at = now + slot.backoff.delay_s(now - worker.started_at)

    def _reap(self) -> None:
        """Take note of processes that have ended."""
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._workers.remove(worker)
            if not worker.is_leaving:
                _log.warning("%s ended with code %d", worker, worker.process.returncode)

    def _look_at_time(self) -> None:
        """Start who is due and kill who is late."""
        now = time.monotonic()
        for slot in self._slots:
            if now >= slot.start_at and not self._is_stopping:
                slot.worker = self._start(slot)
        for worker in self._workers:
            if now >= worker.kill_at:
                _log.error(
                    "%s does not %s: killed", worker, "end" if worker.is_leaving else "start"
                )
                worker.kill_at = inf
                worker.process.kill()

    def _wait_s(self) -> float | None:
        """Seconds until `_look_at_time` has something to do; None: it has not."""
        due = [slot.start_at for slot in self._slots if not self._is_stopping]
        at = min([*due, *(worker.kill_at for worker in self._workers)], default=inf)
        return None if at == inf else max(0.0, at - time.monotonic())

    # what is done

    def _replace_next(self) -> None:
        """Start the successor of the next slot's worker, unless one is starting already."""
        if any(slot.successor for slot in self._slots):
            return
        if self._to_replace:
            slot = self._to_replace.pop(0)
            slot.successor = self._start(slot)

    def _start(self, slot: _Slot) -> _Worker:
        slot.start_at = inf
        status, write_end = os.pipe()
        descriptors = {
            "--listen-fd": slot.data.fileno(),
            "--admin-listen-fd": slot.admin.fileno(),
            "--status-fd": write_end,
            "--lifeline-fd": self._lifeline,
        }
        options = [part for name, fd in descriptors.items() for part in (name, str(fd))]
        process = subprocess.Popen(  # noqa: S603 - our own program
            [*self._command, *options],
            stdin=subprocess.DEVNULL,
            pass_fds=tuple(descriptors.values()),
            start_new_session=True,
        )
        os.close(write_end)
        worker = _Worker(slot, process, status)
        self._workers.add(worker)
        self._selector.register(status, selectors.EVENT_READ, lambda _: self._told(worker))
        return worker

    def _stop(self) -> None:
        """Let all workers drain. Our copies close: when theirs do, clients are refused."""
        if self._is_stopping:
            return
        self._is_stopping = True
        for slot in self._slots:
            slot.data.close()
            slot.admin.close()
        for worker in self._workers:
            self._tell(worker, signal.SIGTERM)

    def _tell(self, worker: _Worker, number: signal.Signals) -> None:
        """Ask a worker to end; whoever was asked already has less to do, not more."""
        worker.is_leaving = True
        worker.kill_at = time.monotonic() + self._leave_s
        worker.process.send_signal(number)


def supervise(config: RouterConfig, command: Sequence[str]) -> None:
    """Keep `config.processes` workers running until told to stop. ConfigError, SupervisorError."""
    Supervisor(config, command).run()


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _sockets(config: RouterConfig) -> list[tuple[int, socket.socket, socket.socket]]:
    """Number, data and admin socket of each slot; worker i's admin port is the i-th from the first.

    An inherited data socket is shared: its one queue is served by whoever comes first.
    """
    assert config.processes is not None
    if config.listen_fd is None:
        group = bind_group(config.host, config.port, config.processes)
    else:
        first = inherited(config.listen_fd)
        group = [first, *(first.dup() for _ in range(config.processes - 1))]
    slots = []
    for number, data in enumerate(group):
        admin_port = config.admin_port + number if config.admin_port else 0
        slots.append((number, data, bind(config.admin_host, admin_port)))
    for _, data, admin in slots:
        data.listen(BACKLOG)
        admin.listen(BACKLOG)
    return slots
