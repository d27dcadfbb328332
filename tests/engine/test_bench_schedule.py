"""The scheduling benchmark runs and prints what it measured."""

from __future__ import annotations

from click.testing import CliRunner

from roost.cli import main


def test_every_batch_and_context_has_a_row() -> None:
    result = CliRunner().invoke(main, ["bench", "schedule", "--rounds", "1"])

    assert result.exit_code == 0, result.output
    _, *rows = [line.split() for line in result.output.splitlines()]
    assert [(int(batch), int(context)) for batch, context, *_ in rows] == [
        (batch, context) for context in (128, 4096) for batch in (1, 32, 256)
    ]
    assert all(float(slowest) >= float(typical) > 0 for _, _, typical, slowest, _ in rows)
