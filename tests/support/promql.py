"""Evaluates PromQL as far as our alert rules use it, and runs promtool's unit tests of rules.

So that alerts are tested where promtool is not installed; where it is, the same file goes through
both (tests/deploy/test_alerts.py). What is not known here raises, and is never guessed.

Semantics are those of Prometheus 3 (promql/engine.go, functions.go): ranges are open on the left,
instants look back for LOOKBACK_S, rate() extrapolates to the ends of its range where the first
and last samples are near them.
"""

from __future__ import annotations

import math
import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import promql_parser as parser

LOOKBACK_S = 300.0

Labels = frozenset[tuple[str, str]]
Samples = tuple[list[float], list[float]]  # seconds, values
Vector = dict[Labels, float]

_NAME = "__name__"
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda left, right: left / right if right else math.nan if not left else math.inf,
}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_AGGREGATIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "avg": lambda values: sum(values) / len(values),
    "count": len,
}


class Database:
    """Series by labels, the name among them."""

    def __init__(self) -> None:
        self._series: dict[str, dict[Labels, Samples]] = {}

    def add(self, labels: Labels, at: float, value: float) -> None:
        """One sample; times of a series only rise."""
        of_name = self._series.setdefault(dict(labels)[_NAME], {})
        times, values = of_name.setdefault(labels, ([], []))
        times.append(at)
        values.append(value)

    def select(self, selector: parser.VectorSelector) -> Iterator[tuple[Labels, Samples]]:
        """The series that fit."""
        for labels, samples in self._series.get(selector.name, {}).items():
            has = dict(labels)
            if all(_fits(matcher, has) for matcher in selector.matchers.matchers):
                yield labels, samples


def _fits(matcher: Any, has: dict[str, str]) -> bool:
    value = has.get(matcher.name, "")
    if matcher.op in (parser.MatchOp.Equal, parser.MatchOp.NotEqual):
        is_like = value == matcher.value
    else:
        is_like = re.fullmatch(matcher.value, value) is not None
    return is_like == (matcher.op in (parser.MatchOp.Equal, parser.MatchOp.Re))


class Evaluator:
    """One expression after the other, at one moment."""

    def __init__(self, database: Database, now: float) -> None:
        self._database = database
        self._now = now

    def vector(self, node: Any) -> Vector:
        """The value of an expression that is a vector."""
        value = self._value(node)
        assert isinstance(value, dict), f"a number: {node}"
        return value

    def _value(self, node: Any) -> Vector | float:
        if isinstance(node, parser.ParenExpr):
            return self._value(node.expr)
        if isinstance(node, parser.NumberLiteral):
            return float(node.val)
        if isinstance(node, parser.VectorSelector):
            return self._instant(node)
        if isinstance(node, parser.AggregateExpr):
            return self._aggregate(node)
        if isinstance(node, parser.BinaryExpr):
            return self._binary(node)
        if isinstance(node, parser.Call):
            return self._call(node)
        raise NotImplementedError(str(node))

    def _instant(self, node: Any) -> Vector:
        at = self._now - (node.offset.total_seconds() if node.offset else 0.0)
        found = {}
        for labels, (times, values) in self._database.select(node):
            last = bisect_right(times, at) - 1
            if last >= 0 and times[last] > at - LOOKBACK_S:
                found[labels] = values[last]
        return found

    def _aggregate(self, node: Any) -> Vector:
        by = set(node.modifier.labels) if node.modifier else set()
        assert not node.modifier or node.modifier.type == parser.AggModifierType.By
        groups: dict[Labels, list[float]] = {}
        for labels, value in self.vector(node.expr).items():
            group = frozenset(label for label in labels if label[0] in by)
            groups.setdefault(group, []).append(value)
        merge = _AGGREGATIONS[str(node.op)]
        return {labels: float(merge(values)) for labels, values in groups.items()}

    def _binary(self, node: Any) -> Vector | float:
        assert node.modifier is None
        left, right = self._value(node.lhs), self._value(node.rhs)
        op = str(node.op)
        if isinstance(left, float) and isinstance(right, float):
            return _ARITHMETIC[op](left, right)
        if isinstance(left, float):
            pairs = [(labels, left, value, value) for labels, value in right.items()]
        elif isinstance(right, float):
            pairs = [(labels, value, right, value) for labels, value in left.items()]
        else:
            others = {_unnamed(labels): value for labels, value in right.items()}
            pairs = [
                (labels, value, others[_unnamed(labels)], value)
                for labels, value in left.items()
                if _unnamed(labels) in others
            ]
        if op in _COMPARISONS:
            keeps = _COMPARISONS[op]
            return {labels: kept for labels, a, b, kept in pairs if keeps(a, b)}
        compute = _ARITHMETIC[op]
        return {_unnamed(labels): compute(a, b) for labels, a, b, _ in pairs}

    def _call(self, node: Any) -> Vector | float:
        name, arguments = node.func.name, node.args
        if name == "absent":
            return {} if self.vector(arguments[0]) else {frozenset(_required(arguments[0])): 1.0}
        if name == "scalar":
            values = list(self.vector(arguments[0]).values())
            return values[0] if len(values) == 1 else math.nan
        if name == "histogram_quantile":
            return _quantiles(float(arguments[0].val), self.vector(arguments[1]))
        return self._over_time(_RANGES[name], arguments[0])

    def _over_time(self, function: Callable[..., float | None], node: Any) -> Vector:
        assert isinstance(node, parser.MatrixSelector)
        selector, range_s = node.vector_selector, node.range.total_seconds()
        assert selector.offset is None
        found = {}
        for labels, (times, values) in self._database.select(selector):
            first = bisect_right(times, self._now - range_s)
            last = bisect_right(times, self._now)
            if first < last:
                value = function(times[first:last], values[first:last], self._now, range_s)
                if value is not None:
                    found[_unnamed(labels)] = value
        return found


def _unnamed(labels: Labels) -> Labels:
    return frozenset(label for label in labels if label[0] != _NAME)


def _required(node: Any) -> Iterator[tuple[str, str]]:
    """What absent() knows of what is not there: only of a plain selector."""
    if isinstance(node, parser.VectorSelector):
        for matcher in node.matchers.matchers:
            if matcher.op == parser.MatchOp.Equal:
                yield matcher.name, matcher.value


def _increase(times: list[float], values: list[float], now: float, range_s: float) -> float | None:
    """extrapolatedRate() of functions.go, for counters."""
    if len(times) < 2:
        return None
    steps = pairwise(values)
    grown = values[-1] - values[0] + sum(before for before, after in steps if after < before)
    sampled_s = times[-1] - times[0]
    mean_s = sampled_s / (len(times) - 1)
    to_start_s, to_end_s = times[0] - (now - range_s), now - times[-1]
    if to_start_s >= mean_s * 1.1:
        to_start_s = mean_s / 2
    if grown > 0 and values[0] >= 0:  # a counter was 0 once, and not less
        to_start_s = min(to_start_s, sampled_s * values[0] / grown)
    if to_end_s >= mean_s * 1.1:
        to_end_s = mean_s / 2
    return grown * (sampled_s + to_start_s + to_end_s) / sampled_s


def _rate(times: list[float], values: list[float], now: float, range_s: float) -> float | None:
    increase = _increase(times, values, now, range_s)
    return None if increase is None else increase / range_s


def _changes(times: list[float], values: list[float], now: float, range_s: float) -> float:
    return float(sum(a != b for a, b in pairwise(values)))


def _mean(times: list[float], values: list[float], now: float, range_s: float) -> float:
    return sum(values) / len(values)


_RANGES: dict[str, Callable[..., float | None]] = {
    "rate": _rate,
    "increase": _increase,
    "changes": _changes,
    "avg_over_time": _mean,
}


def _quantiles(share: float, buckets: Vector) -> Vector:
    """histogram_quantile(), for buckets that begin at 0."""
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        bound = float(dict(labels)["le"].replace("+Inf", "inf"))
        group = frozenset(label for label in labels if label[0] not in {"le", _NAME})
        groups.setdefault(group, []).append((bound, count))
    return {group: _quantile(share, sorted(counts)) for group, counts in groups.items()}


def _quantile(share: float, counts: list[tuple[float, float]]) -> float:
    total = counts[-1][1]
    if not total or counts[-1][0] != math.inf:
        return math.nan
    below, lower = 0.0, 0.0
    for bound, count in counts:
        if count >= share * total:
            if bound == math.inf:
                return lower
            return lower + (bound - lower) * (share * total - below) / (count - below)
        below, lower = count, bound
    raise AssertionError("counts of buckets rise")


class Rules:
    """Groups of rules, evaluated again and again; keeps the samples that they make."""

    def __init__(self, groups: list[dict[str, Any]], database: Database) -> None:
        self._database = database
        self._rules = [
            (rule, parser.parse(rule["expr"])) for group in groups for rule in group["rules"]
        ]
        self._since: dict[tuple[str, Labels], float] = {}
        self.alerts: Vector = {}  # pending and firing, as of the last evaluation

    def evaluate(self, now: float) -> None:
        """All rules, in their order, at `now` (seconds)."""
        since: dict[tuple[str, Labels], float] = {}
        self.alerts = {}
        for rule, node in self._rules:
            found = Evaluator(self._database, now).vector(node)
            if "record" in rule:
                for labels, value in found.items():
                    self._database.add(labels | {(_NAME, rule["record"])}, now, value)
                continue
            name = rule["alert"]
            for labels in found:
                key = name, _unnamed(labels)
                since[key] = self._since.get(key, now)
                is_firing = now - since[key] >= seconds(rule.get("for", "0s"))
                own = {
                    (_NAME, "ALERTS"),
                    ("alertname", name),
                    ("alertstate", "firing" if is_firing else "pending"),
                    *rule["labels"].items(),
                }
                self.alerts[_unnamed(labels) | own] = 1.0
        self._since = since


def seconds(duration: str) -> float:
    """Of 1d2h3m4s."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return float(sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+)([dhms])", duration)))


def sample_values(notation: str) -> Iterator[float | None]:
    """Of promtool's `a+bxn`, `axn`, `_xn` and plain values; None: no sample."""
    for part in notation.split():
        value, _, times = part.partition("x")
        count = int(times) + 1 if times else 1
        if value == "_":
            yield from [None] * (count if not times else count - 1)
            continue
        start, plus, step = value.partition("+")
        yield from (float(start) + number * float(step if plus else 0) for number in range(count))


def failures(test: dict[str, Any], groups: list[dict[str, Any]], interval_s: float) -> list[str]:
    """What one of promtool's tests expects of ALERTS and does not find."""
    database = Database()
    step_s = seconds(test["interval"])
    for series in test["input_series"]:
        selector = parser.parse(series["series"])
        matchers = {(m.name, m.value) for m in selector.matchers.matchers}
        labels = frozenset({(_NAME, selector.name), *matchers})
        for number, value in enumerate(sample_values(series["values"])):
            if value is not None:
                database.add(labels, number * step_s, value)
    rules = Rules(groups, database)
    checks = {seconds(check["eval_time"]): check for check in test["promql_expr_test"]}
    found = []
    for number in range(int(max(checks) / interval_s) + 1):
        rules.evaluate(number * interval_s)
        check = checks.pop(number * interval_s, None)
        if check is not None:
            asked = parser.parse(check["expr"])
            has = {one for one in rules.alerts if _is_asked(asked, one)}
            expected = {_labels(sample["labels"]) for sample in check.get("exp_samples", [])}
            found += [f"{check['eval_time']}: missing {dict(one)}" for one in expected - has]
            found += [f"{check['eval_time']}: not expected {dict(one)}" for one in has - expected]
    assert not checks, "eval_time is to be a multiple of evaluation_interval"
    return found


def _is_asked(selector: Any, labels: Labels) -> bool:
    return all(_fits(matcher, dict(labels)) for matcher in selector.matchers.matchers)


def _labels(text: str) -> Labels:
    selector = parser.parse(text)
    matchers = {(m.name, m.value) for m in selector.matchers.matchers}
    return frozenset({(_NAME, selector.name), *matchers})
