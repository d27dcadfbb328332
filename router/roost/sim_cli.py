"""`roost sim`: options of the fleet simulator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from roost.cli_parts import FILE, NEW_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from roost_loadtest.fleet_sim.sweep import FleetConfig
    from roost_loadtest.fleet_sim.trace import Trace
    from roost_router.policy.interface import Policy

_POSITIVE = click.FloatRange(0.0, min_open=True)


class _InTurn(click.ParamType[tuple[Any, ...]]):
    """Values with commas between them, which replicas get in turn."""

    def __init__(self, of: click.ParamType[Any]) -> None:
        self._of = of
        self.name = f"{of.name},..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._of.convert(part, param, ctx) for part in str(value).split(","))


@click.command()
@click.argument("traces", nargs=-1, required=True, type=FILE, metavar="TRACE...")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="By name, or module:Class of your own; repeat to compare.  [default: all by name]",
)
@click.option("--bound/--no-bound", default=True, help="Add the bound: one cache shared by all.")
@click.option(
    "--replicas",
    "num_replicas",
    type=click.IntRange(1, 1024),
    default=8,
    help="Alike, but for --speeds and --kv-tokens.",
)
@click.option(
    "--replica",
    type=click.Choice(["model", "engine"]),
    default="model",
    help="A closed form, or our engine's scheduler and block pool, which take longer. The bound's "
    "are always the closed form.",
)
@click.option(
    "--speeds",
    type=_InTurn(_POSITIVE),
    default="1",
    help="Of the replicas in turn, over and over: 1,1,0.5,2.",
)
@click.option(
    "--misfits",
    type=_InTurn(_POSITIVE),
    help="Routers begin with prefill speeds that are wrong by these factors, of the replicas in "
    "turn: 0.5,1.5.  [default: they know none]",
)
@click.option(
    "--load",
    "loads",
    type=_POSITIVE,
    multiple=True,
    default=(0.85,),
    show_default=False,
    help="Of what the fleet can carry if every replica hits like one cache that sees all requests; "
    "repeat.  [default: 0.85]",
)
@click.option(
    "--routers",
    "num_routers",
    type=click.IntRange(1, 64),
    default=1,
    help="Each request comes to one of them at random.",
)
@click.option(
    "--shares-after",
    "news_after_s",
    type=click.FloatRange(0.0),
    help="Seconds until routers know what the others placed, as they tell through Redis.  "
    "[default: they share nothing]",
)
@click.option(
    "--stale",
    "hears_after_s",
    type=click.FloatRange(0.0),
    default=0.0,
    help="Seconds after which routers hear what replicas tell: first tokens, cached tokens, ends.",
)
@click.option(
    "--poll-interval",
    "poll_interval_s",
    type=click.FloatRange(0.01),
    default=1.0,
    help="Seconds between looks at a replica.",
)
@click.option(
    "--tells",
    type=click.Choice(["requests", "queues", "changes"]),
    default="requests",
    help="What replicas tell of their load: how many requests they have, when polled, as vLLM; and "
    "the tokens that are left to compute; the same whenever it changes, as our engine.",
)
@click.option(
    "--knows",
    type=click.Choice(["placements", "events"]),
    default="placements",
    help="What routers go by: their own placements and cached tokens, or KV events as well.",
)
@click.option(
    "--events-after",
    "events_after_s",
    type=click.FloatRange(0.0),
    default=0.05,
    help="Seconds until a KV event is known; --stale, if that is longer.",
)
@click.option(
    "--tokens-after",
    "tokens_after_s",
    type=click.FloatRange(0.0),
    default=0.02,
    help="Seconds until the tokens of a prompt are known, which KV events tell of; 0: before it is "
    "decided.",
)
@click.option(
    "--kv-tokens",
    type=_InTurn(click.IntRange(1)),
    default="500000",
    help="KV cache in tokens, of the replicas in turn. Routers take those with as much for alike.",
)
@click.option(
    "--token-us", type=_POSITIVE, default=40.0, help="Arithmetic of a token: microseconds."
)
@click.option(
    "--pair-ns",
    type=click.FloatRange(0.0),
    default=1.3,
    help="Attention of a prompt: nanoseconds a pair of query and key.",
)
@click.option(
    "--step-ms", type=click.FloatRange(0.0), default=6.0, help="A step that decodes, at least: ms."
)
@click.option(
    "--context-ns",
    type=click.FloatRange(0.0),
    default=50.0,
    help="Decode: nanoseconds for each token of a stream's context.",
)
@click.option(
    "--chunk", "chunk_tokens", type=click.IntRange(1), default=2048, help="Prompt tokens a step."
)
@click.option("--slo-ttft", "ttft_s", type=_POSITIVE, default=2.0, help="Seconds of a good TTFT.")
@click.option("--slo-itl", "itl_s", type=_POSITIVE, default=0.1, help="Seconds of a good ITL.")
@click.option("--limit", type=click.IntRange(1), help="Requests read of each trace.")
@click.option("--seed", type=int, default=0, help="Ties and, with several routers, who asks whom.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row, in seconds.")
@click.option("--svg", type=NEW_FILE, help="Draw mean TTFT against load here.")
def sim(
    traces: tuple[Path, ...], as_json: bool, svg: Path | None, limit: int | None, **options: Any
) -> None:
    """Simulate a fleet under the real router: policies on a TRACE, in virtual time.

    A TRACE has a JSON object a line, plain or gzip: t (ms), in, out (tokens), hash_ids, block.

    Example: roost sim trace.jsonl.gz --replicas 8 --load 0.7 --load 0.95
    """
    import msgspec

    from roost_loadtest.fleet_sim.load import TooLargeError
    from roost_loadtest.fleet_sim.picture import picture
    from roost_loadtest.fleet_sim.summary import Row, table
    from roost_loadtest.fleet_sim.sweep import sweep
    from roost_loadtest.fleet_sim.told import NoEventsError
    from roost_loadtest.fleet_sim.trace import TraceError, read_trace

    policies = _policies(options.pop("policies"))
    bound, loads = options.pop("bound"), options.pop("loads")
    config = _config(options)
    rows: list[Row] = []
    try:
        for path in traces:
            trace = read_trace(path, limit)
            on_progress = _progress(trace) if sys.stderr.isatty() else None
            for row in sweep(
                trace, config, loads=loads, policies=policies, bound=bound, on_progress=on_progress
            ):
                if as_json:
                    click.echo(msgspec.json.encode(row))
                rows.append(row)
    except (TraceError, TooLargeError, NoEventsError) as error:
        raise click.ClickException(str(error)) from None
    if not as_json:
        click.echo(table(rows))
    if svg is not None:
        svg.write_text(picture(rows), encoding="utf-8")


def _policies(names: Iterable[str]) -> dict[str, Callable[[], Policy]]:
    from functools import partial

    from roost_router.policy.registry import POLICY_NAMES, PolicyError, make_policy

    chosen = tuple(names) or POLICY_NAMES
    for name in chosen:
        try:
            make_policy(name)
        except PolicyError as error:
            raise click.BadParameter(str(error), param_hint="--policy") from None
    return {name: partial(make_policy, name) for name in chosen}


def _config(options: dict[str, Any]) -> FleetConfig:
    from roost_loadtest.fleet_sim.events import TellsLoad
    from roost_loadtest.fleet_sim.model import StepTimes
    from roost_loadtest.fleet_sim.summary import Slo
    from roost_loadtest.fleet_sim.sweep import FleetConfig
    from roost_loadtest.fleet_sim.told import EventDelays

    times = StepTimes(
        token_s=options.pop("token_us") / 1e6,
        pair_s=options.pop("pair_ns") / 1e9,
        step_s=options.pop("step_ms") / 1e3,
        context_s=options.pop("context_ns") / 1e9,
        chunk_tokens=options.pop("chunk_tokens"),
    )
    options["tells"] = TellsLoad(options["tells"])
    options["is_engine"] = options.pop("replica") == "engine"
    options["misfits"] = options["misfits"] or ()
    slo = Slo(options.pop("ttft_s"), options.pop("itl_s"))
    delays: EventDelays | None = EventDelays(
        events_after_s=options.pop("events_after_s"), tokens_after_s=options.pop("tokens_after_s")
    )
    if options.pop("knows") == "placements":
        delays = None
    return FleetConfig(times=times, slo=slo, delays=delays, **options)


def _progress(trace: Trace) -> Callable[[str, float, int], None]:
    total = len(trace.requests)

    def show(policy: str, load: float, num_done: int) -> None:
        text = f"{trace.name}, load {load:g}, {policy}: {num_done / total:.0%}"
        click.echo(f"\r{text:<70}" + ("\n" if num_done == total else ""), err=True, nl=False)

    return show
