"""Composition root of a replica: builds every part, runs it, stops it in order.

    model --> runner --+
    pool --> scheduler +--> core --> front end --> HTTP application --> socket

Order matters at both ends. The port is bound first, so that a port in use is known before
seconds are spent on weights, but nobody can connect before the model has computed one step.
On SIGTERM, SIGINT or the end of `lifeline_fd`: stop accepting, let running requests finish
within the grace period, fail the rest, close.

Not here: command line (roost.cli), what any part does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import Literal

import msgspec
import torch
from aiohttp import web

from roost_engine.batch import Chunk
from roost_engine.blocks import BlockPool
from roost_engine.config import CacheConfig, SchedulerConfig
from roost_engine.core import EngineCore
from roost_engine.frontend import Frontend
from roost_engine.loader import LoadedModel, ModelFileError, load_model
from roost_engine.metrics import EngineMetrics
from roost_engine.runner import ModelRunner
from roost_engine.scheduler import Scheduler
from roost_engine.server import build_app

_DEFAULT_MAX_MODEL_LEN = 8192
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one replica."""

    model: str  # nickname, .gguf file or Hugging Face folder
    host: str = "127.0.0.1"
    port: int = 8100  # 0: any free one, shown in the ready line
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: half the memory, less exact
    threads: int | None = None  # of torch; None: one for each core
    kv_tokens: int = 65536  # capacity of the KV cache; more keeps more conversations warm
    block_size: int = 16  # tokens
    max_model_len: int | None = None  # None: what the model was trained for, at most 8192
    max_step_tokens: int = 512  # larger prefills faster, delays decodes more
    max_running: int = 64
    max_waiting: int = 1024  # beyond it 429
    served_model_name: str | None = None  # None: the model's own
    grace_s: float = 30.0  # how long running requests may finish after SIGTERM
    lifeline_fd: int | None = None  # stop when this pipe reaches its end: the parent died


class ServeError(Exception):
    """The replica cannot start; the operator's fault, the message names the cure."""


async def serve(config: ServeConfig) -> None:
    """Run a replica until it is told to stop.

    SystemExit(1), after one line on stderr, if it cannot start.
    """
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if config.lifeline_fd is not None:
        _stop_on_end_of(config.lifeline_fd, stop)
    try:
        with _bind(config.host, config.port) as listener:
            frontend = await asyncio.to_thread(build_frontend, config)
            if not stop.is_set():
                await _run(frontend, listener, stop, config.grace_s)
    except (ServeError, ModelFileError) as error:
        sys.stderr.write(f"roost engine: {error}\n")
        raise SystemExit(1) from None


def build_frontend(config: ServeConfig) -> Frontend:
    """Load the model and put the parts together; takes seconds. The core is not started.

    ServeError or ModelFileError if the options do not fit the model.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(config.model, _DTYPES[config.dtype])
    try:
        cache, limits = _limits(config, model)
    except ValueError as error:
        raise ServeError(str(error)) from None
    runner = ModelRunner(model, cache)
    # The first step is several times slower than the next ones; no client should pay for it.
    runner.forward([Chunk(token_ids=[0], start=0, block_table=[0], wants_logits=True)])
    pool = BlockPool(cache.num_blocks, cache.block_size)
    core = EngineCore(Scheduler(limits, pool, model.config.eos_token_ids), runner)
    name = config.served_model_name or model.name
    return Frontend(
        model_name=name,
        tokenizer=model.tokenizer,
        vocab_size=model.config.vocab_size,
        core=core,
        metrics=EngineMetrics(name, core),
    )


def _limits(config: ServeConfig, model: LoadedModel) -> tuple[CacheConfig, SchedulerConfig]:
    """Sizes of cache and steps. ValueError or ServeError if they contradict each other."""
    longest = model.config.max_position
    max_model_len = config.max_model_len or min(longest, _DEFAULT_MAX_MODEL_LEN)
    if max_model_len > longest:
        raise ServeError(f"max_model_len {max_model_len} exceeds the model's {longest} tokens")
    if config.kv_tokens < max_model_len:
        raise ServeError(
            f"kv_tokens {config.kv_tokens} cannot hold one request of max_model_len "
            f"{max_model_len} tokens; raise the former or lower the latter"
        )
    cache = CacheConfig(
        num_blocks=-(-config.kv_tokens // config.block_size), block_size=config.block_size
    )
    limits = SchedulerConfig(
        max_step_tokens=config.max_step_tokens,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        max_model_len=max_model_len,
    )
    return cache, limits


async def _run(
    frontend: Frontend, listener: socket.socket, stop: asyncio.Event, grace_s: float
) -> None:
    frontend.core.start()
    runner = web.AppRunner(
        build_app(frontend), handler_cancellation=True, access_log=None, shutdown_timeout=2.0
    )
    await runner.setup()
    site = web.SockSite(runner, listener)
    await site.start()
    _announce(frontend, listener)
    await stop.wait()
    await site.stop()
    await frontend.core.stop(grace_s)
    await runner.cleanup()


def _announce(frontend: Frontend, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    pool = frontend.core.scheduler.pool
    kv_tokens = pool.num_blocks * pool.block_size
    sys.stdout.write(
        f"ready: {frontend.model_name} on http://{host}:{port} "
        f"(context {frontend.max_model_len} tokens, KV cache {kv_tokens} tokens)\n"
    )
    sys.stdout.flush()


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. ServeError if the address is taken or wrong."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


def _stop_on_end_of(fd: int, stop: asyncio.Event) -> None:
    """Set `stop` when the other end of a pipe is closed; nothing is ever written to it."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            stop.set()

    os.set_blocking(fd, False)
    loop.add_reader(fd, read)
