"""A follower: the process that computes one part of a split model (`python -m`, by parallel.py).

A thread does nothing but read stdin, so that the end of the pipe, which is the end of rank 0,
ends this process whatever it is computing or waiting for.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import Final

import msgspec
import torch

from roost_engine.loader import ModelFileError, load_model
from roost_engine.parallel import LOST_OTHERS, Start, Step, read_frame
from roost_engine.parallel_stage import Links, StageRunner, open_store

_STDIN: Final = 0


def main() -> None:
    """Serve rank 0 until its pipe ends. SystemExit, after one line, if it cannot go on."""
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_all, args=(frames,), daemon=True).start()
    start = msgspec.msgpack.decode(frames.get(), type=Start)
    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    _say_ready()
    links = Links(start.plan, start.rank, open_store(start.plan, start.port))
    try:
        model = load_model(start.source)
    except ModelFileError as error:
        _tell(start, str(error))
        raise SystemExit(1) from None
    stage = StageRunner(model, start.cache, getattr(torch, start.dtype), links)
    _say_ready()
    decode = msgspec.msgpack.Decoder(Step).decode
    while True:
        step = decode(frames.get())
        stage.copy_blocks(step.copies)
        if not step.chunks:
            continue
        layout = stage.lay_out(step.chunks)
        try:
            stage.compute(layout)
        except RuntimeError as error:
            _tell(start, f"cannot go on: {error}")
            raise SystemExit(LOST_OTHERS) from None


def _tell(start: Start, problem: str) -> None:
    sys.stderr.write(f"roost engine, process {start.rank}: {problem}\n")


def _read_all(frames: queue.SimpleQueue[bytes]) -> None:
    # Not sys.stdin: its lock would be held here when the interpreter ends.
    while (frame := read_frame(_STDIN)) is not None:
        frames.put(frame)
    os._exit(0)  # at once: the main thread may wait for a process that is gone


def _say_ready() -> None:
    sys.stdout.buffer.write(b".")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
