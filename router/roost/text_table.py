"""Tables and figures as text: what the commands that show a router have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roost_router.policy.shadow import ShadowReport


def table(rows: Sequence[Sequence[str]], align: str, indent: str = "  ") -> list[str]:
    """`rows` as lines. `align`: "<" or ">" for each column, left or right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        columns = zip(row, align, widths, strict=True)
        lines.append(indent + "  ".join(f"{cell:{side}{width}}" for cell, side, width in columns))
    return [line.rstrip() for line in lines]


def percent(share: float | None) -> str:
    """A share as people read it; "-" where it is not known."""
    return "-" if share is None else f"{share * 100:.1f} %"


def seconds(value: float | None) -> str:
    """Seconds to the millisecond; "-" where they are not known."""
    return "-" if value is None else f"{value:.3f} s"


def duration(value: float) -> str:
    """How long something has lasted, in its two largest units."""
    minutes, rest_s = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"


def shadow_text(shadow: ShadowReport) -> str:
    """What a shadow policy would have done."""
    failed = f", failed at {shadow.num_failed:,}" if shadow.num_failed else ""
    return (
        f"shadow policy {shadow.policy}: agrees with {percent(shadow.agreement)} of "
        f"{shadow.num_decisions:,} decisions{failed}; predicted wait "
        f"{seconds(shadow.shadow_wait_s)} against {seconds(shadow.wait_s)}, hit rate "
        f"{percent(shadow.shadow_hit_rate)} against {percent(shadow.hit_rate)}"
    )
