"""Policies by name: ours, the peers', and users' own by import path.

    make_policy("cost")              one of POLICY_NAMES
    make_policy("my_module:Mine")    a class with `pick`, see interface.py, made without arguments

Each call makes a new object: what a policy keeps (a turn, a ring) is one router's own.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final

from roost_router.policy.aibrix import PrefixCache
from roost_router.policy.chwbl import BoundedHashing
from roost_router.policy.cost import CostPolicy
from roost_router.policy.dynamo import DynamoCost
from roost_router.policy.least_outstanding import LeastOutstanding
from roost_router.policy.llm_d import WeightedScorers
from roost_router.policy.power_of_two import PowerOfTwo
from roost_router.policy.production_stack import PrefixAware, Session
from roost_router.policy.round_robin import RoundRobin
from roost_router.policy.sglang import CacheAware
from roost_router.policy.smg import Spill

if TYPE_CHECKING:
    from collections.abc import Callable

    from roost_router.policy.interface import Policy

DEFAULT_POLICY: Final = "late-binding"
_MAKERS: Final[dict[str, Callable[[], Policy]]] = {
    DEFAULT_POLICY: partial(CostPolicy, holds=True),
    "cost": CostPolicy,
    "aibrix": PrefixCache,
    "chwbl": BoundedHashing,
    "dynamo": DynamoCost,
    "least-outstanding": LeastOutstanding,
    "llm-d": WeightedScorers,
    "power-of-two": PowerOfTwo,
    "production-stack-prefix": PrefixAware,
    "production-stack-session": Session,
    "round-robin": RoundRobin,
    "sglang": CacheAware,
    "smg": Spill,
}
POLICY_NAMES: Final = tuple(_MAKERS)


class PolicyError(ValueError):
    """There is no such policy, or it cannot be made; the message says what to do."""


def make_policy(name: str) -> Policy:
    """A new policy: one of POLICY_NAMES, or `module:Class` of the user's own.

    Raises PolicyError.
    """
    maker = _MAKERS.get(name)
    if maker is not None:
        return maker()
    if ":" in name:
        return _imported(name)
    known = ", ".join(POLICY_NAMES)
    raise PolicyError(f"no policy is called '{name}': use one of {known}, or module:Class")


def _imported(path: str) -> Policy:
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise PolicyError(f"policy '{path}' is not of the form module:Class")
    # What a user's module raises can be anything; it goes into the message and stays the cause.
    try:
        module = import_module(module_name)
    except Exception as error:
        raise PolicyError(
            f"policy '{path}': cannot import {module_name}: {_told(error)}"
        ) from error
    maker = getattr(module, class_name, None)
    if not isinstance(maker, type) or not callable(getattr(maker, "pick", None)):
        raise PolicyError(
            f"policy '{path}': {module_name} has no class '{class_name}' with a method 'pick'"
        )
    try:
        made: Policy = maker()
    except Exception as error:
        raise PolicyError(f"policy '{path}': making it failed: {_told(error)}") from error
    return made


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
