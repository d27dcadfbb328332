"""Dashboards: made by their script; each expression parses, each metric exists."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType

import pytest
from deployed import DEPLOY, complaints, exported, selectors

BOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
UNITS = {"s", "bytes", "percentunit", "reqps", "ops", "short"}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", DEPLOY / "dashboards.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["dashboards"] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    return module


def test_what_is_committed_is_what_the_script_makes():
    made = script().made()
    assert {path for path in made if path.suffix == ".json"} == set(BOARDS)
    for path, text in made.items():
        assert path.read_text() == text, "run python deploy/dashboards.py"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_have_a_place_a_unit_and_something_to_show(path):
    board = json.loads(path.read_text())
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
            assert panel["targets"]
            ids = [target["refId"] for target in panel["targets"]]
            assert len(set(ids)) == len(ids)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_boards_are_told_apart():
    boards = [json.loads(path.read_text()) for path in BOARDS]
    assert len({board["uid"] for board in boards}) == len({b["title"] for b in boards}) == 4


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_expressions_parse_and_ask_for_metrics_that_exist(path):
    for panel in json.loads(path.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "1m")
            assert complaints(expression) == []
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= {
                label for of in selectors(expression) for label in exported()[of.name]
            }


def test_what_nobody_exposes_is_noticed():
    assert complaints("sum(rate(roost_router_request_total[1m]))") == [
        "no metric roost_router_request_total"
    ]
    assert complaints('sum by (le) (roost_router_requests_total{status="ok"})') == [
        "roost_router_requests_total has no le",
        "roost_router_requests_total has no status",
    ]
    with pytest.raises(ValueError, match="unclosed"):
        complaints("sum(up")
