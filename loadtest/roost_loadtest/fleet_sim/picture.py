"""TTFT against load as an SVG: a panel for each trace, a line for each policy. Pure.

Both axes as they are read: load from left to right, seconds upwards on a scale of logarithms, since
policies part by factors. Ours is drawn last, thick; the bound, which no router can reach, dashed.
Written by hand: the shapes are five, and matplotlib would be 60 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

from roost_loadtest.fleet_sim.summary import Row
from roost_loadtest.fleet_sim.sweep import BOUND
from roost_router.policy.registry import DEFAULT_POLICY

_PANEL_W, _PANEL_H = 280, 250
_LEFT, _TOP, _GAP, _LEGEND_ROW = 46, 54, 30, 18
_LEGEND_COLUMN_W = 190
_SVG, _TEXT = "http://www.w3.org/2000/svg", 'font-family="sans-serif" font-size="12" fill="#333"'
_OURS, _BOUND = "#d1495b", "#555555"
#: Told apart also where red and green are not.
_PEERS = (
    *("#00798c", "#edae49", "#66a182", "#2e4057", "#8d96a3", "#a06cd5", "#6a994e", "#bc6c25"),
    *("#3a86ff", "#ff70a6", "#7f5539", "#118ab2"),
)


def picture(rows: Sequence[Row]) -> str:
    """Mean TTFT of `rows`, at least one. O(rows)."""
    traces = list(dict.fromkeys(row.trace for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    peers = [policy for policy in policies if policy not in {DEFAULT_POLICY, BOUND}]
    colors = {peer: _PEERS[place % len(_PEERS)] for place, peer in enumerate(peers)}
    colors |= {DEFAULT_POLICY: _OURS, BOUND: _BOUND}
    drawn = [*peers, *(p for p in (BOUND, DEFAULT_POLICY) if p in policies)]  # ours on top
    width = _GAP + len(traces) * (_LEFT + _PANEL_W + _GAP)
    columns = max(1, (width - 2 * _GAP) // _LEGEND_COLUMN_W)
    legend_y = _TOP + _PANEL_H + 48
    height = legend_y + ceil(len(drawn) / columns) * _LEGEND_ROW + 8
    parts = [
        f'<svg xmlns="{_SVG}" viewBox="0 0 {width} {height}" {_TEXT}>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{_GAP}" y="20">mean TTFT in seconds against load, by policy</text>',
    ]
    for place, trace in enumerate(traces):
        x = _GAP + place * (_LEFT + _PANEL_W + _GAP) + _LEFT
        of_trace = [row for row in rows if row.trace == trace]
        parts += _panel(x, of_trace, drawn, colors)
    for place, policy in enumerate(reversed(drawn)):
        x = _GAP + place % columns * _LEGEND_COLUMN_W
        y = legend_y + place // columns * _LEGEND_ROW
        parts.append(f'<path d="M{x} {y}h22" {_stroke(policy, colors)}/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(policy)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    left: int, rows: Sequence[Row], policies: Sequence[str], colors: dict[str, str]
) -> list[str]:
    loads = sorted({row.load for row in rows})
    seconds = [max(row.ttft_mean_s, 1e-4) for row in rows]
    low, high = floor(log10(min(seconds)) * 2) / 2, ceil(log10(max(seconds)) * 2) / 2
    high = max(high, low + 0.5)
    span = loads[-1] - loads[0] or 1.0

    def x_of(load: float) -> float:
        return left + 8 + (load - loads[0]) / span * (_PANEL_W - 16)

    def y_of(value: float) -> float:
        return _TOP + (high - log10(max(value, 1e-4))) / (high - low) * _PANEL_H

    bottom = _TOP + _PANEL_H
    parts = [f'<text x="{left}" y="{_TOP - 10}" font-weight="bold">{escape(rows[0].trace)}</text>']
    for tick in _ticks(low, high):
        y = y_of(tick)
        parts.append(f'<path d="M{left} {y:.1f}h{_PANEL_W}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for load in loads:
        parts.append(f'<path d="M{x_of(load):.1f} {bottom}v4" stroke="#999"/>')
        label = f'<text x="{x_of(load):.1f}" y="{bottom + 18}" text-anchor="middle">{load:g}</text>'
        parts.append(label)
    for policy in policies:
        of_policy = sorted((row for row in rows if row.policy == policy), key=lambda row: row.load)
        places = [f"{x_of(row.load):.1f} {y_of(row.ttft_mean_s):.1f}" for row in of_policy]
        if len(places) == 1:  # a line of one point would not be seen
            across, down = places[0].split()
            parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{colors[policy]}"/>')
        elif places:
            parts.append(f'<path d="M{"L".join(places)}" {_stroke(policy, colors)}/>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten between two logarithms."""
    powers = range(floor(low), ceil(high) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [tick for tick in ticks if low - 1e-9 <= log10(tick) <= high + 1e-9]


def _stroke(policy: str, colors: dict[str, str]) -> str:
    width = 3 if policy == DEFAULT_POLICY else 1.5
    dashes = ' stroke-dasharray="5 4"' if policy == BOUND else ""
    return f'fill="none" stroke="{colors[policy]}" stroke-width="{width}"{dashes}'
