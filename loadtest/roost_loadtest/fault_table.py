"""The fault matrix as text, Markdown and JSON. Pure.

A cell tells how many requests were lost and how: `12 cut`, `11 cut 1 hang`; `0` is what everyone
wants. Routers are columns, in the order in which they were measured.
"""

from __future__ import annotations

import msgspec

from roost_loadtest.fault_matrix import Cell, Leaving, Matrix
from roost_loadtest.fault_replica import Fault

_LEAVING = "client leaves {}: seen in 50 ms, 1 s"


def rows(matrix: Matrix) -> list[list[str]]:
    """The table: a row of titles, then one for each fault."""
    titles = [f"{name} {version}".strip() for name, version in matrix.routers.items()]
    table = [["fault", *titles]]
    cells = {(cell.fault, cell.router): cell for cell in matrix.cells}
    table += [
        [fault.value, *(_cell(cells[fault.value, name]) for name in matrix.routers)]
        for fault in matrix.config.faults
    ]
    leaving = {(each.silent, each.router): each for each in matrix.leaving}
    table += [
        [_LEAVING.format(silent), *(_leaving(leaving[silent, name]) for name in matrix.routers)]
        for silent in dict.fromkeys(each.silent for each in matrix.leaving)
    ]
    return table


def as_text(matrix: Matrix) -> str:
    """Columns padded for a terminal."""
    table = rows(matrix)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([_heading(matrix), *lines])


def as_markdown(matrix: Matrix) -> str:
    """A table for documents."""
    head, *body = rows(matrix)
    lines = [_line(head), _line(["---"] * len(head)), *map(_line, body)]
    return "\n".join([_heading(matrix), "", *lines, ""])


def as_json(matrix: Matrix) -> bytes:
    """Every cell with its hits and examples."""
    return msgspec.json.format(msgspec.json.encode(matrix), indent=1)


def num_lost(matrix: Matrix, title: str) -> int:
    """Requests that the router of this column lost, over all rows."""
    return sum(cell.lost for cell in matrix.cells if cell.router == title)


def _heading(matrix: Matrix) -> str:
    config = matrix.config
    faulty = "both fail every third request" if config.both else "A fails every request"
    return (
        f"Lost of {config.requests} streams, {config.concurrency} at a time; of two replicas "
        f"{faulty}, health checks stay green; clients wait {config.patience_s:g} s"
    )


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    kinds = sorted(cell.kinds.items(), key=lambda kind: -kind[1])
    text = ", ".join(f"{count} {kind}" for kind, count in kinds) or "0"
    return text if cell.hits or cell.fault == Fault.DEAD.value else f"{text} (never met)"


def _leaving(leaving: Leaving) -> str:
    return f"{leaving.seen_soon}/{leaving.clients}, {leaving.seen_late}/{leaving.clients}"
