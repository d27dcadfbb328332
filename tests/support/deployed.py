"""What tests of deploy/ share: its files, the options and the metrics that it may name."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
from roost_engine.request import FinishReason
from roost_router.app import Router, build_placer
from roost_router.config import RouterConfig

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
#: What Prometheus adds to each series; the namespace only on Kubernetes.
_TARGET = frozenset({"job", "instance", "namespace"})
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
        context = click.Context(command, resilient_parsing=True)
        values, _, _ = command.make_parser(context).parse_args(split)
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
def exported() -> dict[str, frozenset[str]]:
    """Names of all samples that a router or an engine exposes, with their labels."""
    return asyncio.run(_exported())


async def _exported() -> dict[str, frozenset[str]]:
    with tempfile.NamedTemporaryFile() as secret:
        secret.write(b"for metrics' names, no secret at all")
        secret.flush()
        config = RouterConfig(
            replicas=("http://127.0.0.1:1",),
            tokenizers=(("m", Path()),),
            redis="redis://127.0.0.1:1",
            redis_secret_file=Path(secret.name),
        )
        router = Router(config, build_placer(config, Random(1)))
    engine = HandEngine()
    metrics = EngineMetrics("m", EngineCore(engine.scheduler, engine.model))
    metrics.count_finished(FinishReason.STOP)
    families = [
        *router.service.metrics.registry.collect(),
        *text_string_to_metric_families(metrics.render().decode()),
    ]
    found = {"up": _TARGET}
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels}
        labels.update(getattr(family, "_labelnames", ()))  # where there is no sample yet
        for suffix in _SAMPLES.get(family.type, ("",)):
            of_suffix = labels - {"le"} | ({"le"} if suffix == "_bucket" else set())
            found[family.name + suffix] = _TARGET | of_suffix
    return found


def complaints(expression: str, recorded: Iterable[str] = ()) -> list[str]:
    """Metrics and labels of a PromQL expression that do not exist; `recorded`: by rules, do.

    Raises ValueError where it does not parse.
    """
    known = exported() | dict.fromkeys(recorded, _TARGET)
    found: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in known:
                found.append(f"no metric {node.name}")
            else:
                asked = {matcher.name for matcher in node.matchers.matchers}
                found.extend(f"{node.name} has no {label}" for label in asked - known[node.name])
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            for selector in selectors(node.expr.prettify()):
                missing = set(node.modifier.labels) - known.get(selector.name, frozenset())
                found.extend(f"{selector.name} has no {label}" for label in missing)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def selectors(expression: str) -> Iterator[promql_parser.VectorSelector]:
    """The vector selectors of a PromQL expression. Raises ValueError where it does not parse."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return iter(found)
