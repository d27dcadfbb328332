"""What tests of deploy/ share: its files, the options and the metrics that it may name."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import click
import promql_parser
import yaml
from hand_engine import HandEngine
from prometheus_client.parser import text_string_to_metric_families

from roost.cli import main
from roost_engine.core import EngineCore
from roost_engine.metrics import EngineMetrics
from roost_router.app import Router, build_placer
from roost_router.config import RouterConfig

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
#: Declared, and on their way into the router.
OPTIONS_TO_COME = frozenset(
    {
        "--redis",
        "--redis-ca-file",
        "--redis-password-file",
        "--redis-secret-file",
        "--replicas-dns",
        "--replicas-file",
        "--replicas-kubernetes",
    }
)
METRICS_TO_COME = frozenset(
    {
        "roost_news_batches_total",
        "roost_news_lag_seconds",
        "roost_peers",
        "roost_store_errors_total",
        "roost_store_up",
    }
)
#: What Prometheus itself adds.
_PROMETHEUS = frozenset({"up", "ALERTS"})
_SAMPLES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}


def load(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text())


class CommandLine:
    """`roost SUBCOMMAND ...` as some file of deploy/ has it. Fails the test if it cannot be."""

    def __init__(self, arguments: Sequence[str]) -> None:
        name, *rest = arguments
        command = main.commands[name]
        split = [part for argument in rest for part in _split(argument)]
        self.options: dict[str, str] = {}
        known: list[str] = []
        parts = iter(split)
        for part in parts:
            if part in OPTIONS_TO_COME:
                self.options[part] = next(parts)
            else:
                known.append(part)
        context = click.Context(command, resilient_parsing=True)
        values, _, _ = command.make_parser(context).parse_args(known)
        named = {parameter.name: parameter.opts for parameter in command.params}
        for key, value in values.items():
            if value is not None and named.get(key, [""])[0].startswith("--"):
                self.options[named[key][0]] = value
        self._defaults = {
            parameter.opts[0]: parameter.get_default(context) for parameter in command.params
        }

    def number(self, option: str) -> float:
        """An option's value, or its default."""
        return float(self.options.get(option, self._defaults[option]))


def _split(argument: str) -> list[str]:
    option, equals, value = argument.partition("=")
    return [option, value] if equals and option.startswith("--") else [argument]


@functools.cache
def exported() -> frozenset[str]:
    """Names of all samples that a router or an engine exposes, or is to."""
    return asyncio.run(_exported())


async def _exported() -> frozenset[str]:
    config = RouterConfig(replicas=("http://127.0.0.1:1",), tokenizers=(("m", Path()),))
    router = Router(config, build_placer(config, Random(1)))
    engine = HandEngine()
    metrics = EngineMetrics("m", EngineCore(engine.scheduler, engine.model))
    families = [
        *router.service.metrics.registry.collect(),
        *text_string_to_metric_families(metrics.render().decode()),
    ]
    names = {
        family.name + suffix for family in families for suffix in _SAMPLES.get(family.type, ("",))
    }
    return METRICS_TO_COME.union(names, _PROMETHEUS)


def selectors(expression: str) -> Iterator[promql_parser.VectorSelector]:
    """The vector selectors of a PromQL expression. Raises ValueError where it does not parse."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return iter(found)
