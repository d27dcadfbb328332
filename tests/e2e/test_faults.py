"""Nothing is lost: a short fault matrix and kills of real engines, through the real router."""

from __future__ import annotations

import pytest

from roost_loadtest import fault_table
from roost_loadtest.fault_fleet import FleetConfig, run_kill
from roost_loadtest.fault_kills import KillConfig, run_kills
from roost_loadtest.fault_matrix import Column, MatrixConfig, run_matrix
from roost_loadtest.fault_replica import Fault
from roost_loadtest.fault_restarts import RestartConfig, run_restarts
from roost_loadtest.fault_routers import ours

QUICK = tuple(fault for fault in Fault if "hang" not in fault.value and fault is not Fault.NONE)


def silent(_: str) -> None:
    """Tests show no progress."""


@pytest.mark.parametrize("dialect", ["roost", "vllm"])
async def test_no_fault_of_a_replica_loses_a_stream(dialect):
    column = Column("roost", ours(), dialect)
    config = MatrixConfig(requests=8, tokens=12, faults=QUICK, has_leaving=False)

    matrix = await run_matrix([column], config, silent)

    assert fault_table.num_lost(matrix, "roost") == 0, fault_table.as_text(matrix)
    met = {cell.fault for cell in matrix.cells if cell.hits}
    assert met == {fault.value for fault in QUICK if fault is not Fault.DEAD}


async def test_a_replica_that_falls_silent_in_a_stream_loses_nothing():
    column = Column("roost", ours(), "roost")
    config = MatrixConfig(
        requests=8, tokens=12, faults=(Fault.HANG_MID,), patience_s=30.0, has_leaving=False
    )

    matrix = await run_matrix([column], config, silent)

    assert fault_table.num_lost(matrix, "roost") == 0, fault_table.as_text(matrix)
    assert matrix.cells[0].hits


@pytest.mark.model
async def test_killed_streams_of_real_engines_end_as_if_nothing_had_happened():
    config = KillConfig(kills=20, process_kills=1, prompts=1, tokens=24, patience_s=60.0)

    report = await run_kills(config, silent)

    assert report.num_kills >= 20
    assert {stream.variant for stream in report.killed} > {"greedy"}
    assert report.lost == {}, report.examples


@pytest.mark.model
async def test_clients_of_a_killed_engine_all_get_their_answers():
    config = FleetConfig(clients=4, requests=6, prompts=2, tokens=12)

    report = await run_kill(config, silent)

    assert (report.delivered, report.requests) == (24, 24), report.examples


async def test_a_restart_in_place_is_not_noticed():
    config = RestartConfig(restarts=2, kept=3, fresh=3, long=2, long_tokens=100)

    report = await run_restarts(config, silent)

    assert report.num_lost == 0, report.tallies
    assert all(tally.delivered for tally in report.tallies.values())
