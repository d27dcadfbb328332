"""The engines that `roost bench engine` compares, all behind one interface.

    OfflineEngine   prefill and decode without HTTP
        DriverEngine    ours and vLLM: a process of engine_driver.py that stays and takes commands
        LlamaCpp        llama-bench and llama-batched-bench, a process a measurement (0.5 s to load)
    ServedEngine    an OpenAI server, as its users start it

Two cores cannot be shared: an engine is stopped (SIGSTOP, all its processes) from its start until
it is measured, and again afterwards, so whoever is measured has the machine to itself.

Peers run at their best: vLLM compiled, bf16, tcmalloc and Intel's OpenMP preloaded where given;
llama.cpp built for this CPU, once as it comes (the file mapped) and, with `huge_pages`, with its
weights read into huge pages as ours are.

Not here: rounds and tables (bench_engine.py), the clients of servers (served_load.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

PROMPT_TOKENS = 32  # of each request of a decode measurement
NEW_TOKENS = 64

_START_S = 600.0  # vLLM compiles for minutes on a machine that is busy
# llama.cpp with its weights in huge pages: read into memory of malloc, which asks for them.
_UNMAPPED = ["--load-mode", "none"]
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_DRIVER = Path(__file__).with_name("engine_driver.py")


class PeerError(Exception):
    """An engine does not start or does not answer; the message names it and its log."""


class Sample(msgspec.Struct, frozen=True):
    """One measurement."""

    tokens: int
    seconds: float

    @property
    def tokens_s(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Launch(msgspec.Struct, frozen=True):
    """How a process is started."""

    command: list[str]
    environment: dict[str, str] = {}


class OfflineEngine(Protocol):
    """An engine without a server. `start` leaves it stopped; measuring lets it run meanwhile."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        ...

    def start(self) -> dict[str, Any]:
        """Make it ready; what it says about itself. PeerError if it fails."""
        ...

    def prefill(self, tokens: int, seed: int) -> Sample:
        """Compute one prompt."""
        ...

    def decode(self, batch: int, seed: int) -> Sample:
        """Generate NEW_TOKENS for `batch` requests at once, prompts of PROMPT_TOKENS."""
        ...

    def stop(self) -> None:
        """End it; harmless when it was not started."""
        ...


class ProcessGroup:
    """A child with its descendants in a session of their own; its output goes to a log file."""

    def __init__(self, name: str, launch: Launch, log: Path, *, talks: bool = False) -> None:
        """`talks`: its stdin and stdout are pipes to us."""
        self.name = name
        self._log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                launch.command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                start_new_session=True,
                env=_environment() | launch.environment,
                text=True,
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let a stopped group run."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Stop it where it is; it keeps its memory and no core."""
        self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whoever of the group is left after 20 s."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(20)
        self._signal(signal.SIGKILL)
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def failed(self, what: str) -> PeerError:
        """The error to raise, with the log's last lines."""
        last = self._log.read_text(errors="replace").splitlines()[-12:]
        return PeerError("\n  ".join([f"{self.name}: {what} (log: {self._log})", *last]))

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of the group have ended
            os.killpg(self.popen.pid, number)


class DriverEngine:
    """An engine behind engine_driver.py."""

    def __init__(self, name: str, launch: Launch, log: Path) -> None:
        self.name = name
        self._launch = launch
        self._log = log
        self._group: ProcessGroup | None = None

    def start(self) -> dict[str, Any]:
        """See OfflineEngine; a first small batch and prompt warm it up."""
        self._group = ProcessGroup(self.name, self._launch, self._log, talks=True)
        info: dict[str, Any] = self._answer()["ready"]
        self._group.pause()
        self._ask(op="decode", batch=4, prompt_tokens=PROMPT_TOKENS, new_tokens=4, seed=0)
        self._ask(op="prefill", tokens=128, seed=0)
        return info

    def prefill(self, tokens: int, seed: int) -> Sample:
        """See OfflineEngine."""
        return self._ask(op="prefill", tokens=tokens, seed=seed)

    def decode(self, batch: int, seed: int) -> Sample:
        """See OfflineEngine."""
        return self._ask(
            op="decode", batch=batch, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, seed=seed
        )

    def stop(self) -> None:
        """See OfflineEngine."""
        if self._group is not None:
            self._group.stop()

    def _ask(self, **command: object) -> Sample:
        assert self._group is not None
        assert self._group.popen.stdin is not None
        with self._group.running():
            try:
                self._group.popen.stdin.write(json.dumps(command) + "\n")
                self._group.popen.stdin.flush()
            except BrokenPipeError:
                raise self._group.failed("has ended") from None
            return msgspec.convert(self._answer(), Sample)

    def _answer(self) -> dict[str, Any]:
        assert self._group is not None
        assert self._group.popen.stdout is not None
        line = self._group.popen.stdout.readline()
        if not line:
            raise self._group.failed("has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaCpp:
    """llama.cpp's own benchmarks on one GGUF file."""

    def __init__(
        self, name: str, folder: Path, gguf: Path, threads: int, *, huge_pages: bool = False
    ) -> None:
        self.name = name
        self._folder = folder
        self._options = ["-m", str(gguf), "-t", str(threads)]
        self._environment = _environment()
        if huge_pages:
            self._options += _UNMAPPED
            self._environment |= _HUGE_PAGES

    def start(self) -> dict[str, Any]:
        """Nothing stays running; see whether the tools are there."""
        for tool in ("llama-bench", "llama-batched-bench"):
            if not (self._folder / tool).is_file():
                raise PeerError(f"{self.name}: {self._folder / tool} does not exist")
        return {}

    def prefill(self, tokens: int, seed: int) -> Sample:
        """See OfflineEngine; the tool's own prompt, after its own warm-up."""
        del seed
        rows = self._run("llama-bench", "-p", str(tokens), "-n", "0", "-r", "1", "-o", "jsonl")
        return Sample(tokens, rows[0]["avg_ns"] / 1e9)

    def decode(self, batch: int, seed: int) -> Sample:
        """See OfflineEngine; the tool's own prompts, one sequence each."""
        del seed
        context = batch * (PROMPT_TOKENS + NEW_TOKENS)
        sizes = ["-npp", str(PROMPT_TOKENS), "-ntg", str(NEW_TOKENS), "-npl", str(batch)]
        options = ["-c", str(max(context, 512)), *sizes, "--output-format", "jsonl"]
        row = self._run("llama-batched-bench", *options)[0]
        return Sample(batch * NEW_TOKENS, row["t_tg"])

    def stop(self) -> None:
        """Nothing runs."""

    def _run(self, tool: str, *options: str) -> list[dict[str, Any]]:
        command = [str(self._folder / tool), *self._options, *options]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self._environment, check=False
        )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not rows:
            raise PeerError(f"{self.name}: {' '.join(command)} failed:\n{done.stderr[-1000:]}")
        return rows


class ServedEngine:
    """An OpenAI server on 127.0.0.1."""

    def __init__(self, name: str, launch: Callable[[int], Launch], port: int, log: Path) -> None:
        """`launch` makes the command that serves on a given port."""
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._launch = launch(port)
        self._log = log
        self._group: ProcessGroup | None = None

    def start(self) -> float:
        """Seconds from the start of the process to the first answered /health; left running."""
        started = time.perf_counter()
        self._group = ProcessGroup(self.name, self._launch, self._log)
        while not _is_healthy(self.url):
            if self._group.popen.poll() is not None:
                raise self._group.failed("has ended")
            if time.perf_counter() - started > _START_S:
                raise self._group.failed(f"is not ready after {_START_S:.0f} s")
            time.sleep(0.005)
        return time.perf_counter() - started

    def model(self) -> str:
        """The id of its model."""
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=60) as answer:  # noqa: S310
            return str(json.load(answer)["data"][0]["id"])

    def failed(self, what: str) -> PeerError:
        """The error to raise, with the log's last lines."""
        assert self._group is not None
        return self._group.failed(what)

    @property
    def pid(self) -> int:
        """Of the first of its processes."""
        assert self._group is not None
        return self._group.popen.pid

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Let it run meanwhile; it is stopped afterwards."""
        assert self._group is not None
        return self._group.running()

    def stop(self) -> None:
        """End it; harmless when it was not started."""
        if self._group is not None:
            self._group.stop()


def roost_driver(kind: str, options: Mapping[str, object]) -> Launch:
    """Ours under the driver; `kind` is roost or roost-runner."""
    return Launch([sys.executable, str(_DRIVER), kind, json.dumps(options)])


def roost_server(model: str, options: Sequence[str]) -> Callable[[int], Launch]:
    """`roost serve` with these options."""
    command = [sys.executable, "-m", "roost", "serve", model, *options, "--port"]
    return lambda port: Launch([*command, str(port)])


def vllm_driver(python: Path, model: Path, preload: Sequence[Path], threads: int) -> Launch:
    """vLLM's offline engine under the driver."""
    options = json.dumps({"model": str(model), "dtype": "bfloat16"})
    command = [str(python), str(_DRIVER), "vllm", options]
    return Launch(command, _vllm_environment(preload, threads))


def vllm_server(
    python: Path, model: Path, preload: Sequence[Path], threads: int
) -> Callable[[int], Launch]:
    """vLLM's OpenAI server; its metrics and request log are off."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--dtype", "bfloat16", "--max-model-len", "4096", "--disable-log-stats"]
    environment = _vllm_environment(preload, threads)
    return lambda port: Launch([*command, "--port", str(port)], environment)


def llama_server(
    folder: Path, gguf: Path, threads: int, *, slots: int, huge_pages: bool
) -> Callable[[int], Launch]:
    """llama-server with `slots` requests of at most 2,048 tokens at once."""
    command = [str(folder / "llama-server"), "-m", str(gguf), "-t", str(threads)]
    command += ["-np", str(slots), "-c", str(slots * 2048), "--host", "127.0.0.1"]
    command += _UNMAPPED if huge_pages else []
    environment = _HUGE_PAGES if huge_pages else {}
    return lambda port: Launch([*command, "--port", str(port)], environment)


def _vllm_environment(preload: Sequence[Path], threads: int) -> dict[str, str]:
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(str(library) for library in preload),
    }


def _environment() -> dict[str, str]:
    """Ours, and no folder of a script on the path of modules."""
    return dict(os.environ) | {"PYTHONSAFEPATH": "1"}  # noqa: TID251 - handed to children


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
