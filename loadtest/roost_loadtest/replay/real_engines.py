"""The replay before engines that compute: `roost bench replay --engines roost`. Linux.

Two cores hold a few replicas of a small model with a thread each. What is asked: long documents,
popular by Zipf's law, each time with another question. All routers get the same requests at the
same moments; only the documents' names differ from run to run, so that no run finds the caches of
another, and engines are started once.

How fast it asks follows from the machine: a document is sent to one replica cold and warm, and
`load` is the share of what the fleet could do if every document were computed once.
"""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import msgspec
import uvloop

from roost_loadtest import peers
from roost_loadtest.local_processes import free_port
from roost_loadtest.peers import Launch, PeerError, ServedEngine
from roost_loadtest.prompts import handbook
from roost_loadtest.replay import routers
from roost_loadtest.replay.client import Ask, Chain, Outcome, drive
from roost_loadtest.replay.driving import play, progress_line, say
from roost_loadtest.replay.dynamo_peer import Engines
from roost_loadtest.replay.figures import Figures, figures, table
from roost_loadtest.replay.prompts import as_request, chat_body

ROUTERS = (routers.OURS, "roost:round-robin", "sglang-router:cache_aware")
_PATIENCE_S = 120.0
_QUESTION_TOKENS = 24
_COMPUTED = re.compile(
    r"^vllm:(prompt_tokens|prefix_cache_hits)_total(?:\{.*\})? (\S+)$", re.MULTILINE
)


class RealConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of it."""

    engine: str = "roost"  # roost, llama.cpp or vllm
    model: str = "smollm2"  # of ours
    num_replicas: int = 2
    requests: int = 60
    documents: int = 12
    document_tokens: int = 1000
    output_tokens: int = 16
    load: float = 0.7
    rounds: int = 1
    seed: int = 0
    routers: tuple[str, ...] = ROUTERS
    programs: dict[str, Path | None] = {}
    llama_cpp: Path | None = None
    gguf: Path | None = None
    vllm_python: Path | None = None
    vllm_model: Path | None = None
    vllm_preload: tuple[Path, ...] = ()
    json_path: Path | None = None


class RealResults(msgspec.Struct):
    """All figures, as the JSON file holds them."""

    config: RealConfig
    cold_s: float  # of a document and a question, alone
    warm_s: float
    measured: dict[str, list[Figures]]


def replay_real(config: RealConfig) -> RealResults:
    """Start engines, play the same through every router, print a table.

    Raises PeerError for an engine or router that does not start, ValueError for a wrong option.
    """
    choices, missing = routers.choose(config.routers, config.programs)
    for line in missing:
        say(line)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="roost-replay-")))
        engines = _start_engines(stack, config, folder)
        workload = Workload(config, engines[0].model())
        cold_s, warm_s = workload.calibrate(engines)
        interval_s = workload.interval_s(cold_s, warm_s)
        say(
            f"a prompt takes {cold_s:.2f} s cold, {warm_s:.2f} s warm: one every {interval_s:.2f} s"
        )
        results = RealResults(config, cold_s, warm_s, {choice.label: [] for choice in choices})
        for number in range(config.rounds):
            for choice in routers.turned(choices, number):
                label = f"round {number + 1}, {choice.label}"
                chains = workload.chains(label, interval_s)
                with routers.leaving_out(choice, choices, results.measured):
                    found = _play(choice, engines, chains, folder, label)
                    say(progress_line(label, found))
                    results.measured[choice.label].append(found)
    if config.json_path is not None:
        encoded = msgspec.json.encode(results, enc_hook=str)
        config.json_path.write_bytes(msgspec.json.format(encoded, indent=1))
    title = (
        f"{config.num_replicas} replicas of {config.engine}, {config.requests} requests, "
        f"{config.documents} documents of {config.document_tokens} tokens, load {config.load:g}"
    )
    print("\n".join(["", title, *table(results.measured, routers.OURS)]))
    return results


class Workload:
    """What is asked, and when."""

    def __init__(self, config: RealConfig, model: str) -> None:
        self._config = config
        self._model = model
        rng = random.Random(config.seed)
        weights = list(accumulate(1 / (place + 1) for place in range(config.documents)))
        places = range(config.documents)
        self._documents = rng.choices(places, cum_weights=weights, k=config.requests)
        self._gaps = [rng.expovariate(1.0) for _ in range(config.requests)]

    def calibrate(self, engines: Sequence[ServedEngine]) -> tuple[float, float]:
        """Seconds of an answer by one engine alone, its document cold and warm."""
        port = int(engines[0].url.rpartition(":")[2])
        asks = [Ask(partial(self._request, "calibration", 0, n)) for n in range(2)]
        cold, warm = uvloop.run(drive(port, [Chain(0.0, asks)], patience_s=_PATIENCE_S))
        for outcome in (cold, warm):
            if outcome.error:
                raise PeerError(f"{engines[0].name}: {outcome.error}")
        return _seconds(cold), _seconds(warm)

    def interval_s(self, cold_s: float, warm_s: float) -> float:
        """Mean seconds between two requests, for the load."""
        config, num_cold = self._config, len(set(self._documents))
        work_s = num_cold * cold_s + (config.requests - num_cold) * warm_s
        return work_s / config.requests / config.num_replicas / config.load

    def chains(self, salt: str, interval_s: float) -> list[Chain]:
        """The requests of a run."""
        moments = accumulate(gap * interval_s for gap in self._gaps)
        return [
            Chain(at, [Ask(partial(self._request, salt, document, number))])
            for number, (at, document) in enumerate(zip(moments, self._documents, strict=True))
        ]

    def _request(self, salt: str, document: int, number: int) -> bytes:
        config = self._config
        text = handbook(f"house {document} of {salt}", config.document_tokens)
        question = handbook(f"question {number}", _QUESTION_TOKENS)
        body = chat_body(self._model, f"{text}\n\n{question}", config.output_tokens)
        return as_request(body, session=str(document))


def _seconds(outcome: Outcome) -> float:
    return outcome.ended_s - outcome.sent_s


def _play(
    choice: routers.Choice,
    engines: Sequence[ServedEngine],
    chains: Sequence[Chain],
    folder: Path,
    label: str,
) -> Figures:
    ports = [int(engine.url.rpartition(":")[2]) for engine in engines]
    probe = as_request(chat_body(engines[0].model(), "Are you there?", 1))
    before = [_computed_tokens(engine.url) for engine in engines]
    with contextlib.ExitStack() as stack:
        running = routers.start(stack, choice, Engines(ports, (), 16, 0), probe, folder)
        outcomes, spent = play(
            chains, running.target, [engine.pid for engine in engines], _PATIENCE_S, label
        )
    after = [_computed_tokens(engine.url) for engine in engines]
    computed = [now - was for now, was in zip(after, before, strict=True)]
    return figures(outcomes, spent, computed_tokens=computed, engines_compute=True)


def _computed_tokens(url: str) -> int:
    """Prompt tokens that the engine has computed, by vLLM's counters; 0 where it has none."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:  # noqa: S310
        page = answer.read().decode()
    totals = {"prompt_tokens": 0.0, "prefix_cache_hits": 0.0}
    for name, value in _COMPUTED.findall(page):
        totals[name] += float(value)
    return int(totals["prompt_tokens"] - totals["prefix_cache_hits"])


def _start_engines(
    stack: contextlib.ExitStack, config: RealConfig, folder: Path
) -> list[ServedEngine]:
    launch, engines = _launch(config), []
    for number in range(config.num_replicas):
        name = f"{config.engine}-{number}"
        engine = ServedEngine(name, launch, free_port(), folder / f"{name}.log")
        stack.callback(engine.stop)
        say(f"{name} is ready after {engine.start():.1f} s")
        engines.append(engine)
    return engines


def _launch(config: RealConfig) -> Callable[[int], Launch]:
    """How a replica with one thread is started."""
    match config.engine:
        case "roost":
            return peers.roost_server(config.model, ["--threads", "1"])
        case "llama.cpp":
            if config.llama_cpp is None or config.gguf is None:
                raise ValueError("llama.cpp needs --llama-cpp and --gguf")
            serve = peers.llama_server(config.llama_cpp, config.gguf, 1, slots=8, huge_pages=False)
            return lambda port: _and(serve(port), "--metrics")
        case "vllm":
            if config.vllm_python is None or config.vllm_model is None:
                raise ValueError("vllm needs --vllm-python and --vllm-model")
            serve = peers.vllm_server(config.vllm_python, config.vllm_model, config.vllm_preload, 1)
            return lambda port: _and(serve(port), "--enable-prompt-tokens-details")
        case engine:
            raise ValueError(f"{engine} is not one of roost, llama.cpp, vllm")


def _and(launch: Launch, option: str) -> Launch:
    return msgspec.structs.replace(launch, command=[*launch.command, option])
