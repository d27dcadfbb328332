"""Policies by name and by import path; what is wrong is said with its cause."""

from __future__ import annotations

import re
import sys
from random import Random

import pytest
from click.testing import CliRunner

from roost.cli import main
from roost_router.app import build_placer
from roost_router.config import ConfigError, RouterConfig
from roost_router.openai_request import RoutingFields
from roost_router.policy.cost import CostPolicy
from roost_router.policy.registry import DEFAULT_POLICY, POLICY_NAMES, PolicyError, make_policy
from roost_wire.load_report import LoadReport

GOOD = """
from roost_router.policy.interface import Decision

NUMBER = 3

class Last:
    def pick(self, candidates, rng):
        return Decision(len(candidates) - 1, [0.0] * len(candidates))

class Picky(Last):
    def __init__(self, needed):
        self.needed = needed

class Other:
    pass
"""


@pytest.fixture
def user_modules(tmp_path, monkeypatch):
    (tmp_path / "users_policies.py").write_text(GOOD)
    (tmp_path / "users_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("users_policies", "users_broken"):
        sys.modules.pop(name, None)


def test_every_name_makes_a_policy_of_its_own():
    for name in POLICY_NAMES:
        assert make_policy(name) is not make_policy(name)
    assert len(POLICY_NAMES) == len(set(POLICY_NAMES)) == 13


def test_the_default_is_ours():
    assert isinstance(make_policy(DEFAULT_POLICY), CostPolicy)


@pytest.mark.usefixtures("user_modules")
def test_a_users_own_class_is_made():
    assert type(make_policy("users_policies:Last")).__name__ == "Last"


@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("costs", "no policy is called 'costs': use one of late-binding, cost, "),
        ("", "no policy is called ''"),
        ("Cost", "no policy is called 'Cost'"),
        (":Last", "not of the form module:Class"),
        ("users_policies:", "not of the form module:Class"),
        ("users_missing:Last", "ModuleNotFoundError: No module named 'users_missing'"),
        ("users_broken:Last", "cannot import users_broken: ZeroDivisionError"),
        ("users_policies:Missing", "users_policies has no class 'Missing' with a method 'pick'"),
        ("users_policies:NUMBER", "has no class 'NUMBER'"),
        ("users_policies:Other", "has no class 'Other' with a method 'pick'"),
        ("users_policies:Picky", "making it failed: TypeError: "),
        (".relative:Last", "TypeError"),
    ],
)
def test_what_is_wrong_is_said(name, said):
    with pytest.raises(PolicyError) as caught:
        make_policy(name)

    assert said in str(caught.value)


def test_a_router_takes_any_policy_by_its_name():
    for name in POLICY_NAMES:
        config = RouterConfig(replicas=("http://127.0.0.1:1", "http://127.0.0.1:2"), policy=name)
        placer = build_placer(config, Random(1))
        for replica in placer.fleet.replicas:
            placer.fleet.answered(replica, ["m"], LoadReport())
        placement = placer.place(RoutingFields("m", stream=True, prompt=b"x" * 1000), 0.0)
        assert placement.replica in placer.fleet.replicas


def test_a_policy_that_does_not_exist_is_a_config_error():
    config = RouterConfig(replicas=("http://127.0.0.1:1",), policy="magic")
    with pytest.raises(ConfigError, match=r"magic.*round-robin"):
        build_placer(config, Random(1))


def test_the_help_names_every_policy():
    shown = re.sub(r"(?<=-)\s+", "", CliRunner().invoke(main, ["route", "--help"]).output)
    assert [name for name in POLICY_NAMES if name not in shown] == []
    assert RouterConfig(replicas=("http://127.0.0.1:1",)).policy == DEFAULT_POLICY
