"""The picture of a sweep: well-formed, every policy a line, nothing that a name could break."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from roost.cli import main
from roost_loadtest.fleet_sim.picture import picture
from roost_loadtest.fleet_sim.summary import Row
from roost_loadtest.fleet_sim.sweep import BOUND

SVG = "{http://www.w3.org/2000/svg}"


def row(trace: str, policy: str, load: float, ttft_s: float) -> Row:
    fields = dict.fromkeys(Row.__struct_fields__, 0.0)
    fields |= {"trace": trace, "policy": policy, "load": load, "ttft_mean_s": ttft_s}
    return Row(**{**fields, "requests": 1})


def lines(svg: str) -> list[ET.Element]:
    root = ET.fromstring(svg)
    return [path for path in root.iter(f"{SVG}path") if path.get("fill") == "none"]


def test_each_policy_is_a_line_in_each_panel_and_in_the_legend():
    policies = ("late-binding", "sglang", BOUND)
    rows = [
        row(trace, policy, load, load * (1 + place))
        for trace in ("a", "b")
        for place, policy in enumerate(policies)
        for load in (0.7, 0.95, 1.15)
    ]

    svg = picture(rows)

    assert len(lines(svg)) == len(policies) * (2 + 1)
    texts = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert {"a", "b", *policies} <= set(texts)
    assert [path.get("stroke-width") for path in lines(svg)].count("3") == 3  # ours


def test_less_time_is_lower_and_more_load_is_further_right():
    rows = [row("a", "late-binding", load, ttft_s) for load, ttft_s in ((0.7, 0.1), (1.15, 9.0))]

    start, end = lines(picture(rows))[0].get("d").removeprefix("M").split("L")

    (x_0, y_0), (x_1, y_1) = (map(float, place.split()) for place in (start, end))
    assert x_0 < x_1
    assert y_0 > y_1


@pytest.mark.parametrize("ttft_s", [0.0, 1e-9, 0.5, 1e6])
def test_one_point_is_drawn_whatever_it_is(ttft_s):
    root = ET.fromstring(picture([row("a", "mine:Policy<&>", 0.85, ttft_s)]))

    assert len(list(root.iter(f"{SVG}circle"))) == 1


def test_the_command_draws_what_it_simulated(tmp_path):
    trace = tmp_path / "trace.jsonl"
    asked = [
        {"t": n * 50, "in": 1024, "out": 4, "hash_ids": [n % 3, 7], "block": 512} for n in range(40)
    ]
    trace.write_text("".join(json.dumps(request) + "\n" for request in asked))
    drawn = tmp_path / "ttft.svg"

    options = [
        "--policy",
        "round-robin",
        "--load",
        "0.5",
        "--load",
        "0.9",
        "--no-bound",
        "--replicas",
        "2",
        "--svg",
    ]
    shown = CliRunner().invoke(main, ["sim", str(trace), *options, str(drawn)])

    assert shown.exit_code == 0, shown.output
    assert "itl p99" in shown.output
    assert len(lines(drawn.read_text())) == 2
