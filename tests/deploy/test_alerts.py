"""Alerts: they parse, name metrics that exist, lead to their runbook, and fire when they must."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from deployed import DEPLOY, ROOT, complaints, load, selectors
from promql import failures

PROMETHEUS = DEPLOY / "prometheus"
GROUPS = load(PROMETHEUS / "alerts.yaml")["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
RECORDED = [rule["record"] for rule in RULES if "record" in rule]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TESTS = load(PROMETHEUS / "alerts_test.yaml")["tests"]
JOBS = {job["job_name"] for job in load(PROMETHEUS / "prometheus.yaml")["scrape_configs"]}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_expressions_parse_and_ask_for_metrics_that_exist(rule):
    assert complaints(rule["expr"], RECORDED) == []
    for selector in selectors(rule["expr"]):
        for matcher in selector.matchers.matchers:
            if matcher.name == "job":
                assert matcher.value in JOBS


@pytest.mark.parametrize("name", ALERTS)
def test_each_says_what_is_wrong_and_where_to_read_on(name):
    alert = ALERTS[name]
    page, _, section = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)

    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"]["summary"].endswith(".")
    assert section in {heading.lower().replace(" ", "-") for heading in headings}


def test_every_alert_has_a_case_in_which_it_fires_and_none_is_of_an_alert_that_is_gone():
    text = yaml.safe_dump(TESTS)
    fired = {
        name
        for test in TESTS
        for check in test["promql_expr_test"]
        for sample in check.get("exp_samples", [])
        for name in re.findall(r'alertname="(\w+)", alertstate="firing"', sample["labels"])
    }
    assert fired == set(ALERTS)
    assert set(re.findall(r'alertname="(\w+)"', text)) <= set(ALERTS)


def test_every_metric_of_an_alert_is_there_while_all_is_well():
    """So that its silence means something."""
    well = TESTS[0]
    assert well["name"] == "all is well"
    series = {next(selectors(one["series"])).name for one in well["input_series"]}
    asked = {s.name for rule in RULES for s in selectors(rule["expr"])}
    of_its_own = {"roost:hit_share:30m", "roost_router_prompt_tokens_total"}
    assert asked - series <= of_its_own | {"roost_router_token_drift"}


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test["name"])
def test_they_fire_when_they_must_and_only_then(test):
    assert failures(test, GROUPS, 60.0) == []


def test_promtool_says_the_same():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    command = [promtool, "test", "rules", "alerts_test.yaml"]
    run = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
