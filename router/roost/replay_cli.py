"""Options of `roost bench replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from roost.cli_parts import FILE, FOLDER, NEW_FILE

_SOME = click.IntRange(1)
_POSITIVE = click.FloatRange(0.0, min_open=True)
_PEERS = ("sglang-router", "smg", "vllm-router")


@click.command()
@click.argument("traces", nargs=-1, type=FILE, metavar="TRACE...")
@click.option(
    "--router",
    "routers",
    multiple=True,
    metavar="NAME[:POLICY]",
    help="roost, nginx, sglang-router, smg, vllm-router or dynamo, with a policy of its own, as "
    "in roost:round-robin or nginx:least_conn. Repeat for each.  [default: a choice of all]",
)
@click.option("--sglang-router", type=FILE, help="Its program, in an environment of its own.")
@click.option("--smg", type=FILE, help="Its program, in an environment of its own.")
@click.option("--vllm-router", type=FILE, help="Its program, in an environment of its own.")
@click.option(
    "--dynamo-python",
    type=FILE,
    help="Python of an environment with ai-dynamo: see replay/dynamo_peer.py.",
)
@click.option("--rounds", type=_SOME, default=1, help="Rounds for each median.")
@click.option("--load", type=_POSITIVE, help="Of the fleet.  [default: 0.85; real engines: 0.7]")
@click.option("--replicas", "num_replicas", type=_SOME, help="[default: 8; real engines: 2]")
@click.option("--json", "json_path", type=NEW_FILE, help="Write every figure here.")
@click.option("--limit", type=_SOME, default=600, help="Requests of each trace.")
@click.option(
    "--speed-up",
    type=_POSITIVE,
    default=4.0,
    help="How many times faster than real time mocks compute and requests come. Routers are not "
    "made faster: the lower, the truer, and the longer it takes.",
)
@click.option(
    "--kv-tokens", type=_SOME, default=500_000, help="KV cache of a mock replica, in tokens."
)
@click.option(
    "--patience",
    "patience_s",
    type=_POSITIVE,
    default=60.0,
    help="Seconds for an answer of a mock.",
)
@click.option(
    "--engines",
    "engine",
    type=click.Choice(["mock", "roost", "llama.cpp", "vllm"]),
    default="mock",
    help="What routers stand before. Real engines take no TRACE: documents are asked about.",
)
@click.option("--requests", type=_SOME, default=60, help="Of real engines.")
@click.option("--model", default="smollm2", help="Of --engines roost, as in `roost serve`.")
@click.option("--llama-cpp", type=FOLDER, help="Folder of llama.cpp's built tools.")
@click.option("--gguf", type=FILE, help="The model of llama.cpp.")
@click.option("--vllm-python", type=FILE, help="Python of an environment with vLLM's CPU build.")
@click.option("--vllm-model", type=FOLDER, help="The model of vLLM, a Hugging Face folder.")
@click.option("--vllm-preload", multiple=True, type=FILE, help="Library for vLLM's LD_PRELOAD.")
def replay(traces: tuple[Path, ...], engine: str, **options: Any) -> None:
    """TTFT, cached tokens and balance of routers over HTTP: ours beside peers, on traces.

    A TRACE (see `roost sim`) is played by the clock, faster than real time, through every router
    before the same mock replicas, which compute, cache and batch as those of `roost sim`. With
    --engines, engines that compute stand there instead, and little is asked of them.

    Times are of the simulation, from the moment when a request was due. A run counts only if
    client and mocks kept up and the machine had time left: otherwise it is marked (!), and a lower
    --speed-up helps. On two cores 4 suits prompts of about 10,000 tokens at 8 replicas (a quarter
    of the machine is used by ours, a third by peers that have prompts tokenised); a router then
    takes a quarter to half a minute for 600 requests. dynamo tokenises itself and wants 1.

    Example: roost bench replay trace.jsonl.gz --vllm-router vllm/bin/vllm-router
    """
    options["programs"] = {name: options.pop(name.replace("-", "_")) for name in _PEERS}
    options["programs"]["dynamo"] = options.pop("dynamo_python")
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    try:
        if engine == "mock":
            _before_mocks(traces, given)
        else:
            _before_engines(traces, engine, given)
    except _errors() as error:
        raise click.ClickException(str(error)) from None


def _errors() -> tuple[type[Exception], ...]:
    """What is told in a line."""
    from roost_loadtest.fleet_sim.load import TooLargeError
    from roost_loadtest.fleet_sim.trace import TraceError
    from roost_loadtest.peers import PeerError
    from roost_loadtest.replay.figures import NoAnswerError
    from roost_loadtest.replay.run import MocksError

    return TraceError, TooLargeError, PeerError, NoAnswerError, MocksError, ValueError


def _before_mocks(traces: tuple[Path, ...], given: dict[str, Any]) -> None:
    import msgspec

    from roost_loadtest.replay.run import ReplayConfig, replay

    if not traces:
        raise click.UsageError("a TRACE is needed, or --engines")
    names = {field.name for field in msgspec.structs.fields(ReplayConfig)}
    replay(traces, ReplayConfig(**{name: given[name] for name in given if name in names}))


def _before_engines(traces: tuple[Path, ...], engine: str, given: dict[str, Any]) -> None:
    import msgspec

    from roost_loadtest.replay.real_engines import RealConfig, replay_real

    if traces:
        raise click.UsageError("real engines take no TRACE")
    names = {field.name for field in msgspec.structs.fields(RealConfig)}
    chosen = {name: given[name] for name in given if name in names}
    replay_real(RealConfig(engine=engine, **chosen))
