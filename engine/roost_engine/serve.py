"""Composition root of a replica: builds every part, runs it, stops it in order.

    model --> runner --+
    pool --> scheduler +--> core --> front end --> HTTP application --> socket

Order matters at both ends. The port is bound first, so that a port in use is known before
seconds are spent on weights, but nobody can connect before the model has computed one step.
On SIGTERM, SIGINT or the end of `lifeline_fd`: stop accepting, let running requests finish
within the grace period, fail the rest, close. When the engine dies the process does too, with
status 1, so that whoever supervises it starts a new one.

Not here: command line (roost.cli), what any part does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from roost_engine.backend import (
    BackendError,
    BackendOptions,
    KernelChoice,
    build_backend,
    kv_bytes_per_token,
    weight_bytes,
)
from roost_engine.batch import Chunk
from roost_engine.blocks import BlockPool
from roost_engine.config import CacheConfig, ModelConfig, SchedulerConfig
from roost_engine.core import EngineCore
from roost_engine.device import DeviceError
from roost_engine.engine_errors import EngineDeadError
from roost_engine.frontend import Frontend
from roost_engine.kv_log import KvEventLog
from roost_engine.kv_teller import KvTeller
from roost_engine.loader import ModelFileError, load_model
from roost_engine.memory import usable_memory_bytes
from roost_engine.metrics import EngineMetrics
from roost_engine.native_runner import WeightFormat
from roost_engine.parallel_plan import ParallelPlan
from roost_engine.scheduler import Scheduler
from roost_engine.server import build_app, build_runner

if TYPE_CHECKING:
    from roost_engine.kv_publisher import KvPublisher

_DEFAULT_MAX_MODEL_LEN = 8192


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one replica."""

    model: str  # nickname, .gguf file or Hugging Face folder
    host: str = "127.0.0.1"
    port: int = 8101  # 0: any free one, shown in the ready line
    weights: WeightFormat = "stored"  # in memory; stored: 4- and 8-bit blocks as in the file
    kernels: KernelChoice = "auto"  # native where a compiler is, else torch
    device: str = "auto"  # of torch: cpu, cuda, cuda:N; auto: a GPU where torch finds one
    threads: int | None = None  # None: one for each core
    tensor_parallel: int = 1  # processes that share each layer; torch only
    pipeline_parallel: int = 1  # processes that hold the layers in turn; torch only
    kv_tokens: int = 65536  # capacity of the KV cache; more keeps more conversations warm
    host_kv_tokens: int = 0  # evicted KV kept in host memory beside it
    block_size: int = 16  # tokens
    max_model_len: int | None = None  # None: what the model was trained for, at most 8192
    max_step_tokens: int = 512  # larger prefills faster, delays decodes more
    max_running: int = 64
    max_waiting: int = 1024  # beyond it 429
    served_model_name: str | None = None  # None: the model's own
    grace_s: float = 30.0  # how long running requests may finish after SIGTERM
    kv_events_endpoint: str | None = None  # of ZeroMQ, e.g. tcp://*:5557; None: nothing is told
    kv_events_replay_endpoint: str | None = None
    kv_events_topic: str = ""
    lifeline_fd: int | None = None  # stop when this pipe reaches its end: the parent died


class ServeError(Exception):
    """The replica cannot start; the operator's fault, the message names the cure."""


async def serve(config: ServeConfig) -> None:
    """Run a replica until it is told to stop.

    SystemExit(1), after one line on stderr, if it cannot start or if the engine dies.
    """
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if config.lifeline_fd is not None:
        _stop_on_end_of(config.lifeline_fd, stop)
    try:
        async with _publisher(config) as publisher:
            with _bind(config.host, config.port) as listener:
                replica = await asyncio.to_thread(build_replica, config)
                try:
                    if not stop.is_set():
                        await _run(replica, listener, stop, config.grace_s, publisher)
                finally:
                    replica.close()
    except (ServeError, ModelFileError, EngineDeadError) as error:
        sys.stderr.write(f"roost engine: {error}\n")
        raise SystemExit(1) from None


class Replica(msgspec.Struct, frozen=True):
    """All parts of a replica, put together."""

    frontend: Frontend
    kv_cache_bytes: int
    computes_with: str
    kv_teller: KvTeller | None = None  # of the core; None: nobody is told
    close: Callable[[], None] = lambda: None  # once the core has stopped


def build_replica(config: ServeConfig) -> Replica:
    """Load the model and put the parts together; takes seconds. The core is not started.

    ServeError or ModelFileError if the options do not fit the model.
    """
    model = load_model(config.model)
    try:
        cache, limits = _limits(config, model.config)
    except ValueError as error:
        raise ServeError(str(error)) from None
    options = BackendOptions(
        kernels=config.kernels,
        device=config.device,
        weights=config.weights,
        num_threads=config.threads,
        max_step_tokens=limits.max_step_tokens,
        plan=ParallelPlan(
            tensor_parallel=config.tensor_parallel, pipeline_parallel=config.pipeline_parallel
        ),
        source=config.model,
    )
    try:
        weights = options.weights_in_memory
        block_bytes = kv_bytes_per_token(model.config, weights) * cache.block_size
        kv_cache_bytes = cache.num_blocks * block_bytes
        host_bytes = cache.num_host_blocks * block_bytes
        if options.is_for_gpu:  # of the machine's memory it takes the host tier's only
            _check_memory(host_bytes, 0)
        else:
            _check_memory(kv_cache_bytes + host_bytes, weight_bytes(model, weights))
        backend = build_backend(model, cache, options)
    except (BackendError, DeviceError) as error:
        raise ServeError(str(error)) from None
    # The first step is slower than the next ones; no client should pay for it.
    backend.runner.forward([Chunk(token_ids=[0], start=0, block_table=[0], wants_logits=True)])
    log = KvEventLog(epoch=secrets.randbits(63)) if config.kv_events_endpoint else None
    pool = BlockPool(
        cache.num_blocks,
        cache.block_size,
        num_host_blocks=cache.num_host_blocks,
        on_event=log.append if log is not None else None,
    )
    teller = KvTeller(log) if log is not None else None
    scheduler = Scheduler(limits, pool, model.config.eos_token_ids)
    core = EngineCore(scheduler, backend.runner, backend.copy_blocks, backend.draw, teller)
    # A full collection would visit each block of the pool: 55 ms in which no token is computed.
    gc.collect()
    gc.freeze()
    name = config.served_model_name or model.name
    frontend = Frontend(
        model_name=name,
        tokenizer=model.tokenizer,
        chat=model.chat,
        vocab_size=model.config.vocab_size,
        core=core,
        metrics=EngineMetrics(name, core),
    )
    return Replica(frontend, kv_cache_bytes, backend.description, teller, backend.close)


def _limits(config: ServeConfig, model: ModelConfig) -> tuple[CacheConfig, SchedulerConfig]:
    """Sizes of cache and steps. ValueError or ServeError if they contradict each other."""
    longest = model.max_position
    max_model_len = config.max_model_len or min(longest, _DEFAULT_MAX_MODEL_LEN)
    if max_model_len > longest:
        raise ServeError(f"max_model_len {max_model_len} exceeds the model's {longest} tokens")
    if config.kv_tokens < max_model_len:
        raise ServeError(
            f"kv_tokens {config.kv_tokens} cannot hold one request of max_model_len "
            f"{max_model_len} tokens; raise the former or lower the latter"
        )
    cache = CacheConfig(
        num_blocks=-(-config.kv_tokens // config.block_size),
        block_size=config.block_size,
        num_host_blocks=-(-config.host_kv_tokens // config.block_size),
    )
    limits = SchedulerConfig(
        max_step_tokens=config.max_step_tokens,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        max_model_len=max_model_len,
    )
    return cache, limits


def _check_memory(kv_cache_bytes: int, weights_bytes: int) -> None:
    """ServeError if the KV cache cannot fit this machine beside the weights.

    Its pages are touched as they are first used: without this check it would be killed later.
    """
    memory_bytes = usable_memory_bytes()
    if memory_bytes is not None and kv_cache_bytes + weights_bytes > memory_bytes:
        raise ServeError(
            f"the KV cache would take {_gigabytes(kv_cache_bytes)} beside weights of "
            f"{_gigabytes(weights_bytes)}, this process may use {_gigabytes(memory_bytes)}; "
            f"lower kv_tokens or host_kv_tokens"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


@contextlib.asynccontextmanager
async def _publisher(config: ServeConfig) -> AsyncIterator[KvPublisher | None]:
    """What tells KV events, its endpoints bound; None: nobody asked for it. ServeError."""
    if config.kv_events_endpoint is None:
        if config.kv_events_replay_endpoint is not None:
            raise ServeError(
                "--kv-events-replay-endpoint repeats what --kv-events-endpoint tells: give both"
            )
        yield None
        return
    # ZeroMQ takes 50 ms to import: those who publish nothing do not pay.
    from roost_engine.kv_publisher import KvPublisher, KvPublisherError  # noqa: PLC0415

    try:
        publisher = KvPublisher(
            config.kv_events_endpoint, config.kv_events_replay_endpoint, config.kv_events_topic
        )
    except KvPublisherError as error:
        raise ServeError(str(error)) from None
    try:
        yield publisher
    finally:
        await publisher.close()


def follow_kv_events(replica: Replica, publisher: KvPublisher) -> bytes:
    """Have the publisher hear of the replica's blocks; what /kv_event_sources says of it."""
    core, teller = replica.frontend.core, replica.kv_teller
    assert teller is not None
    teller.on_batch, teller.on_snapshot = publisher.publish, publisher.take_snapshot
    publisher.start(core.ask_kv_snapshot)
    return msgspec.json.encode([publisher.source(core.scheduler.pool.block_size)])


async def _run(
    replica: Replica,
    listener: socket.socket,
    stop: asyncio.Event,
    grace_s: float,
    publisher: KvPublisher | None,
) -> None:
    """Serve until `stop` is set. EngineDeadError if the engine dies, then or before."""
    core = replica.frontend.core
    kv_sources = b"[]" if publisher is None else follow_kv_events(replica, publisher)
    core.start()
    runner = build_runner(build_app(replica.frontend, kv_sources))
    await runner.setup()
    site = web.SockSite(runner, listener)
    await site.start()
    _announce(replica, listener)
    await _first_of(stop.wait(), core.wait_until_dead())
    await site.stop()
    await core.stop(grace_s)
    await runner.cleanup()
    core.check_alive()


async def _first_of(*awaited: Coroutine[Any, Any, object]) -> None:
    """Return when one of them has; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in awaited]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _announce(replica: Replica, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if listener.family == socket.AF_INET6 else host
    frontend = replica.frontend
    pool = frontend.core.scheduler.pool
    kv_tokens = pool.num_blocks * pool.block_size
    sys.stdout.write(
        f"ready: {frontend.model_name} on http://{address}:{port} "
        f"(context {frontend.max_model_len} tokens, KV cache {kv_tokens} tokens, "
        f"{_gigabytes(replica.kv_cache_bytes)}; {replica.computes_with})\n"
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
