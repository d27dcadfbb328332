"""What benchmarks ask about processes of this machine: CPU, memory, cores, free ports. Linux.

Figures are of a process with all its descendants: a server's workers are its cost too.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of a process and its descendants so far.

    From the kernel's clock of each process (clock_getcpuclockid(3)), which counts nanoseconds
    and all threads, ended ones too; /proc tells no more than ticks of 10 ms.
    """
    return sum(time.clock_gettime((~member << 3) | 2) for member in family(pid))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; pages that they share count for each."""
    pages = (Path(f"/proc/{member}/statm").read_text().split()[1] for member in family(pid))
    return sum(map(int, pages)) * _PAGE


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:  # grows meanwhile
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def two_cores() -> tuple[int | None, int | None]:
    """Two different cores for what must not disturb each other; None where there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Run this process, and what it starts meanwhile, on one core; None: where it may already.

    To be set before a start: threads keep the cores they were started on.
    """
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def allow_open_files(wanted: int) -> int:
    """Raise the limit of open files of this process, and what it starts, as far as it goes.

    Returns what it is now: less than `wanted` where only root may raise it further.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
            return wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
