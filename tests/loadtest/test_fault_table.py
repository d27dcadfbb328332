"""The fault matrix as a table: nothing lost is 0, and a row that proves nothing says so."""

from __future__ import annotations

import msgspec

from roost_loadtest.fault_matrix import Cell, Leaving, Matrix, MatrixConfig
from roost_loadtest.fault_replica import Fault
from roost_loadtest.fault_table import as_json, as_markdown, as_text, num_lost, rows


def cell(router: str, fault: Fault, kinds: dict[str, int], hits: int) -> Cell:
    return Cell(
        router=router,
        fault=fault.value,
        requests=24,
        lost=sum(kinds.values()),
        kinds=kinds,
        hits=hits,
        slowest_s=0.1,
        examples=[],
    )


MATRIX = Matrix(
    config=MatrixConfig(faults=(Fault.DEAD, Fault.RST_MID)),
    routers={"ours": "", "other": "1.2"},
    cells=[
        cell("ours", Fault.DEAD, {}, 0),
        cell("ours", Fault.RST_MID, {}, 0),
        cell("other", Fault.DEAD, {}, 0),
        cell("other", Fault.RST_MID, {"hang": 1, "cut": 11}, 12),
    ],
    leaving=[
        Leaving(
            router=name,
            silent="after headers",
            clients=3,
            seen_soon=soon,
            seen_late=3,
            delays_ms=[],
        )
        for name, soon in (("ours", 3), ("other", 1))
    ],
)


def test_rows_are_faults_and_columns_are_routers_in_their_order():
    assert rows(MATRIX) == [
        ["fault", "ours", "other 1.2"],
        ["dead (refused)", "0", "0"],
        ["RST mid-stream", "0 (never met)", "11 cut, 1 hang"],
        ["client leaves after headers: seen in 50 ms, 1 s", "3/3, 3/3", "1/3, 3/3"],
    ]


def test_lost_requests_are_counted_for_each_router():
    assert num_lost(MATRIX, "ours") == 0
    assert num_lost(MATRIX, "other") == 12


def test_text_markdown_and_json_hold_the_same():
    text, markdown = as_text(MATRIX), as_markdown(MATRIX)

    assert "11 cut, 1 hang" in text
    assert "| RST mid-stream | 0 (never met) | 11 cut, 1 hang |" in markdown
    assert markdown.count("| --- | --- | --- |") == 1
    assert msgspec.json.decode(as_json(MATRIX), type=Matrix) == MATRIX
