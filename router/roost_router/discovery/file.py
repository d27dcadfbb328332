"""A file of replicas, read again when it changes and on SIGHUP. Decides nothing.

It is looked at every LOOK_S and read when it is another than before (inode, size, times) and the
same at two looks: who writes it in place is not read half-way. Replacing it (`mv new replicas.txt`)
is safe whatever happens. A file that cannot be used changes nothing, see roster.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

from roost_router.discovery.replicas_file import (
    MAX_FILE_BYTES,
    ReplicasFileError,
    parse_replicas,
)
from roost_router.discovery.roster import Told
from roost_router.discovery.source import Failed

LOOK_S: Final = 1.0

_State = tuple[int, int, int, int, int]


class FileSource:
    """One file."""

    linger_s: Final = 0.0

    def __init__(self, path: Path, look_s: float = LOOK_S) -> None:
        self.name: Final = f"file {path}"
        self._path: Final = path
        self._look_s: Final = look_s
        self._must_look = asyncio.Event()

    def hurry(self) -> None:
        """Read it now."""
        self._must_look.set()

    async def answers(self) -> AsyncGenerator[list[Told] | Failed, None]:
        """What it lists, at first and whenever that changes."""
        read = before = await asyncio.to_thread(self._state)
        yield await asyncio.to_thread(self._answer)
        while True:
            is_told = await self._wait()
            now = await asyncio.to_thread(self._state)
            if is_told or (now != read and now == before):
                yield await asyncio.to_thread(self._answer)
                read = now
            before = now

    async def _wait(self) -> bool:
        """Until the next look; whether somebody asked for it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._look_s):
                await self._must_look.wait()
        is_told = self._must_look.is_set()
        self._must_look.clear()
        return is_told

    def _state(self) -> _State | None:
        """What differs when the file was written or replaced; None: there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def _answer(self) -> list[Told] | Failed:
        try:
            return read_replicas(self._path)
        except ReplicasFileError as error:
            return Failed(str(error))


def read_replicas(path: Path) -> list[Told]:
    """The replicas that the file at `path` lists. Raises ReplicasFileError; blocks."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would never end
            raise ReplicasFileError(f"{path} is no file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ReplicasFileError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return parse_replicas(data)
    except ReplicasFileError as error:
        raise ReplicasFileError(f"{path}: {error}") from None
