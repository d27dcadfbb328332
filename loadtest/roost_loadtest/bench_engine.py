"""Benchmark: our engine beside vLLM's CPU build and llama.cpp, interleaved in one run.

    offline   decode at several batch sizes, prefill of several lengths, without HTTP
    served    requests that share a long prefix, through the OpenAI API (served_load.py)
    ready     from the start of a server's process to its first answered /health

In each round every engine is measured on a workload before the next workload comes; the order
of the engines turns from round to round; the canary is read between any two measurements. An
engine that is not being measured is stopped. Peers are optional: without them ours runs alone.

Ours appears in two depths: `roost runner` (kernels only, beside llama.cpp's own benchmark) and
`roost` (with scheduler and sampling, beside vLLM's offline engine).

Not here: engines (peers.py), the tables (bench_engine_table.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, TypeVar

import msgspec

from roost_loadtest import bench_engine_table as tables
from roost_loadtest import peers
from roost_loadtest.bench_engine_table import OfflineRecord, ReadyRecord, ServedRecord
from roost_loadtest.canary import Canary, Reading
from roost_loadtest.client import StreamError
from roost_loadtest.local_processes import free_port
from roost_loadtest.served_load import ServedResult, ServedWorkload, run_served

Part = Literal["offline", "served", "ready"]
PARTS: tuple[Part, ...] = ("offline", "served", "ready")

_T = TypeVar("_T")


class EngineBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench engine`."""

    model: str = "smollm2"
    formats: tuple[str, ...] = (
        "bfloat16",
        "stored",
    )  # of ours; peers' servers are compared with the first
    threads: int = 2
    parts: tuple[Part, ...] = PARTS
    rounds: int = 3
    batches: tuple[int, ...] = (1, 4, 16, 32)
    prompts: tuple[int, ...] = (512, 2048)
    workload: ServedWorkload = ServedWorkload()
    vllm_python: Path | None = None  # interpreter of an environment with vLLM
    vllm_model: Path | None = None  # Hugging Face folder with the same weights
    vllm_preload: tuple[Path, ...] = ()  # libraries: tcmalloc, Intel's OpenMP
    llama_cpp: Path | None = None  # folder of llama-bench, llama-batched-bench, llama-server
    gguf_bf16: Path | None = None  # the same weights, compared with `bfloat16`
    gguf: Path | None = None  # the file itself, compared with `stored`
    json_path: Path | None = None

    def __post_init__(self) -> None:
        """ValueError for a peer of which only a part is named: it would be left out silently."""
        if (self.vllm_python is None) != (self.vllm_model is None):
            raise ValueError("vLLM needs both its Python and its model folder")
        if self.vllm_preload and self.vllm_python is None:
            raise ValueError("libraries to preload are for vLLM, whose Python is not named")
        if self.llama_cpp is None and (self.gguf_bf16 or self.gguf):
            raise ValueError("GGUF files are for llama.cpp, whose folder is not named")
        if self.llama_cpp is not None and not (self.gguf_bf16 or self.gguf):
            raise ValueError("llama.cpp needs a GGUF file")


class Results(msgspec.Struct):
    """All records of a run, as the JSON file holds them."""

    config: EngineBenchConfig
    about: dict[str, Any]
    offline: list[OfflineRecord]
    served: list[ServedRecord]
    ready: list[ReadyRecord]


def bench_engine(config: EngineBenchConfig) -> Results:
    """Run the parts, print their tables, write the JSON file. Raises PeerError.

    About 20 minutes with all peers on two cores; vLLM alone takes 2-3 to start, each time.
    """
    results = Results(config, _about_machine(), [], [], [])
    try:
        with tempfile.TemporaryDirectory(prefix="roost-bench-") as folder, _stopping_on_sigterm():
            bench = _Bench(config, results, Path(folder))
            if "offline" in config.parts:
                _print(*bench.run_offline())
            if "ready" in config.parts:
                _print(*bench.run_ready())
            if "served" in config.parts:
                _print(*bench.run_served())
    finally:  # what was measured before a failure is kept
        if config.json_path is not None:
            encoded = msgspec.json.encode(results, enc_hook=str)
            config.json_path.write_bytes(msgspec.json.format(encoded, indent=1))
    return results


class _Bench:
    """One run: what is measured next to what."""

    def __init__(self, config: EngineBenchConfig, results: Results, folder: Path) -> None:
        self._config = config
        self._results = results
        self._folder = folder
        self._canary = Canary(folder, config.threads)
        self._last_reading = self._canary.read()

    def run_offline(self) -> list[str]:
        """Decode and prefill of all engines; the table."""
        config, results = self._config, self._results
        engines, beside = self._offline_engines()
        bytes_per_token: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            for engine in engines:
                stack.callback(engine.stop)
                info = engine.start()
                results.about[engine.name] = info
                _progress(f"{engine.name} is ready: {info}")
                if "weight_bytes" in info:
                    bytes_per_token[engine.name] = info["weight_bytes"]
            for number in range(config.rounds):
                for workload, measure in self._workloads():
                    for engine in _turned(engines, number):
                        seed = 1 + len(results.offline)
                        sample, canary = self._measured(partial(measure, engine, seed))
                        _progress(f"{number} {workload} {engine.name}: {sample.tokens_s:.1f}")
                        results.offline.append(
                            OfflineRecord(
                                round=number,
                                workload=workload,
                                engine=engine.name,
                                tokens_s=sample.tokens_s,
                                canary=canary,
                            )
                        )
        in_order = _sorted_by_engine(results.offline, [engine.name for engine in engines])
        return tables.offline_table(in_order, tables.Comparison(beside, bytes_per_token))

    def run_ready(self) -> list[str]:
        """Start and stop every server once a round; the table."""
        records = self._results.ready
        for number in range(self._config.rounds):
            for server in self._servers(huge_pages=False):
                seconds, canary = self._measured(partial(_time_start, server))
                _progress(f"{number} {server.name} was ready after {seconds:.2f} s")
                records.append(
                    ReadyRecord(round=number, engine=server.name, seconds=seconds, canary=canary)
                )
        return tables.ready_table(records)

    def run_served(self) -> list[str]:
        """The shared-prefix workload on every server; the table."""
        config, records = self._config, self._results.served
        servers = self._servers(huge_pages=True)
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.callback(server.stop)
                server.start()
                warm_up = ServedWorkload(requests=2, clients=2, new_tokens=8)
                self._send(server, warm_up, seed=0)
                _progress(f"{server.name} is ready")
            for number in range(config.rounds):
                for server in _turned(servers, number):
                    send = partial(self._send, server, config.workload, 1 + number)
                    result, canary = self._measured(send)
                    _progress(f"{number} {server.name}: {result.seconds:.2f} s")
                    records.append(
                        ServedRecord(round=number, engine=server.name, result=result, canary=canary)
                    )
        by_name = sorted(records, key=lambda record: _index_of(record.engine, servers))
        return tables.served_table(by_name, servers[0].name)

    def _send(
        self, server: peers.ServedEngine, workload: ServedWorkload, seed: int
    ) -> ServedResult:
        """Let a server run while its clients do."""
        with server.running():
            try:
                return asyncio.run(run_served(server.url, server.model(), workload, seed))
            except StreamError as error:
                raise server.failed(str(error)) from error

    def _measured(self, measure: Callable[[], _T]) -> tuple[_T, Reading]:
        """What it measured, and the mean of the canary's readings around it."""
        before, result = self._last_reading, measure()
        self._last_reading = self._canary.read()
        return result, tables.mean(before, self._last_reading)

    def _workloads(
        self,
    ) -> Iterator[tuple[str, Callable[[peers.OfflineEngine, int], peers.Sample]]]:
        for batch in self._config.batches:
            yield f"decode {batch}", partial(_decode, batch)
        for tokens in self._config.prompts:
            yield f"prefill {tokens}", partial(_prefill, tokens)

    def _offline_engines(self) -> tuple[list[peers.OfflineEngine], dict[str, str]]:
        """All engines, ours first, and which of ours each peer is compared with."""
        config = self._config
        engines: list[peers.OfflineEngine] = []
        beside: dict[str, str] = {}
        for weights in config.formats:
            options = {"model": config.model, "weights": weights, "threads": config.threads}
            launch = peers.roost_driver("roost-runner", options)
            engines.append(self._driver(f"roost runner {weights}", launch))
            launch = peers.roost_driver("roost", options)
            engines.append(self._driver(f"roost {weights}", launch))
        if config.vllm_python is not None and config.vllm_model is not None:
            launch = peers.vllm_driver(
                config.vllm_python, config.vllm_model, config.vllm_preload, config.threads
            )
            engines.append(self._driver("vllm bf16", launch))
            beside["vllm bf16"] = "roost bfloat16"
        if config.llama_cpp is not None:
            for gguf, label, ours in (
                (config.gguf_bf16, "bf16", "bfloat16"),
                (config.gguf, "file", "stored"),
            ):
                for huge_pages in (False, True):
                    if gguf is None:
                        continue
                    name = f"llama.cpp {label}{' huge' if huge_pages else ''}"
                    engines.append(
                        peers.LlamaCpp(
                            name, config.llama_cpp, gguf, config.threads, huge_pages=huge_pages
                        )
                    )
                    beside[name] = f"roost runner {ours}"
        return engines, beside

    def _driver(self, name: str, launch: peers.Launch) -> peers.DriverEngine:
        return peers.DriverEngine(name, launch, self._log(name))

    def _servers(self, *, huge_pages: bool) -> list[peers.ServedEngine]:
        """All servers, ours first, each on a free port.

        llama-server is soonest ready with its file mapped, and serves fastest from huge pages.
        """
        config = self._config
        launches = {
            f"roost {weights}": peers.roost_server(
                config.model, ["--weights", weights, "--threads", str(config.threads)]
            )
            for weights in config.formats
        }
        if config.vllm_python is not None and config.vllm_model is not None:
            launches["vllm bf16"] = peers.vllm_server(
                config.vllm_python, config.vllm_model, config.vllm_preload, config.threads
            )
        if config.llama_cpp is not None and config.gguf_bf16 is not None:
            name = f"llama-server bf16{' huge' if huge_pages else ''}"
            launches[name] = peers.llama_server(
                config.llama_cpp,
                config.gguf_bf16,
                config.threads,
                slots=config.workload.clients,
                huge_pages=huge_pages,
            )
        return [
            peers.ServedEngine(name, launch, free_port(), self._log(name))
            for name, launch in launches.items()
        ]

    def _log(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-')}.log"


def _decode(batch: int, engine: peers.OfflineEngine, seed: int) -> peers.Sample:
    return engine.decode(batch, seed)


def _prefill(tokens: int, engine: peers.OfflineEngine, seed: int) -> peers.Sample:
    return engine.prefill(tokens, seed)


def _time_start(server: peers.ServedEngine) -> float:
    try:
        return server.start()
    finally:
        server.stop()


def _turned(engines: Sequence[_T], number: int) -> list[_T]:
    """Another engine begins in each round."""
    start = number % len(engines)
    return [*engines[start:], *engines[:start]]


def _sorted_by_engine(
    records: Sequence[OfflineRecord], names: Sequence[str]
) -> list[OfflineRecord]:
    return sorted(records, key=lambda record: names.index(record.engine))


def _index_of(name: str, servers: Sequence[peers.ServedEngine]) -> int:
    return [server.name for server in servers].index(name)


def _about_machine() -> dict[str, Any]:
    """Which CPU, where the system tells."""
    cpu = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {"cpu": cpu, "cores": os.cpu_count(), "python": sys.version.split()[0]}


@contextlib.contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Unwind on SIGTERM as on Ctrl-C, so that no stopped engine is left behind."""

    def unwind(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")


def _print(*lines: str) -> None:
    print("\n".join(lines) + "\n", flush=True)
