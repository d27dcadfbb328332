"""Families of scenarios. A run is a family and a seed; the same two give the same run.

In most families one replica (or all but one) goes wrong in one way, while polls say that all are
well, and every request must succeed. Where that cannot be asked for, the family says which other
ends are allowed; all are explicit.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from roost_loadtest.simulation import faults
from roost_loadtest.simulation.client import Manner
from roost_loadtest.simulation.faults import NO_FAULT, Fault, Kind
from roost_loadtest.simulation.judge import Ask, Outcome
from roost_loadtest.simulation.network import Conditions
from roost_loadtest.simulation.replica import Body, Pace, Style
from roost_loadtest.simulation.world import (
    ClientPlan,
    Move,
    ReplicaPlan,
    Result,
    Scenario,
    World,
)

Family = Callable[[Random], Scenario]

#: Ends that say what happened.
_EXPLICIT = frozenset({Outcome.OK, Outcome.ERROR, Outcome.LOST, Outcome.BEHIND})
#: Of answers that are not streamed: nothing else ends their wait for a silent replica.
_WHOLE_TIMEOUT_S = 20.0
_SYSTEM = "You are a simulation. " * 30


def run(family: str, seed: int) -> Result:
    """One run. Deterministic: byte for byte the same log for the same arguments."""
    rng = Random(f"{family}/{seed}")
    return World(FAMILIES[family](rng), rng).run()


# parts of scenarios


def _asks(rng: Random, start: int, count: int, **fixed: Any) -> list[Ask]:
    """Requests of all kinds, except for what is `fixed`."""
    asks = []
    for number in range(start, start + count):
        drawn: dict[str, Any] = {
            "is_chat": rng.random() < 0.7,
            "stream": rng.random() < 0.75,
            "include_usage": rng.random() < 0.5,
            "max_tokens": rng.choice((None, None, 1, 7, 20)),
            "seed": rng.choice((None, 7, 123456789)),
            "text": _SYSTEM[: rng.choice((0, 100, 660))],
            "is_spaced": rng.random() < 0.1,
            "request_id": f"id-{number}" if rng.random() < 0.9 else None,
        }
        ask = Ask(number=number, **{**drawn, **fixed})
        if not ask.stream:
            ask.timeout_s = _WHOLE_TIMEOUT_S
        asks.append(ask)
    return asks


def _clients(rng: Random, *, manner: Manner | None = None, **fixed: Any) -> list[ClientPlan]:
    """A few clients with a few requests each."""
    plans, number = [], 0
    for _ in range(rng.randint(1, 6)):
        count = rng.randint(1, 4)
        plans.append(
            ClientPlan(
                asks=_asks(rng, number, count, **fixed),
                manner=manner or _manner(rng),
            )
        )
        number += count
    return plans


def _manner(rng: Random, **fixed: Any) -> Manner:
    drawn: dict[str, Any] = {
        "starts_at": rng.random() * 0.2,
        "pauses_s": rng.choice((0.0, 0.1)),
        "pipelines": rng.random() < 0.1,
    }
    if not drawn["pipelines"]:
        drawn |= {"sends_slowly": rng.random() < 0.1, "is_http_1_0": rng.random() < 0.03}
    return Manner(**{**drawn, **fixed})


def _conditions(rng: Random) -> Conditions:
    return Conditions(
        latency_s=rng.choice((0.0001, 0.001, 0.01)), slice_share=rng.choice((0.0, 0.1, 0.5))
    )


def _pace(rng: Random) -> Pace:
    return Pace(ttft_s=rng.choice((0.005, 0.03, 0.2)), itl_s=rng.choice((0.001, 0.01, 0.03)))


def _well(rng: Random, dialect: str = "roost", **fixed: Any) -> ReplicaPlan:
    return ReplicaPlan(style=Style.drawn(rng, dialect), pace=_pace(rng), **fixed)


def _sometimes(
    rng: Random, share: float, kinds: tuple[Kind, ...], **options: Any
) -> Callable[[Body, float], Fault]:
    def next_fault(body: Body, now: float) -> Fault:  # noqa: ARG001
        return faults.draw(rng, kinds, **options) if rng.random() < share else NO_FAULT

    return next_fault


def _one_bad(rng: Random, kinds: tuple[Kind, ...], *, dialect: str = "roost") -> Scenario:
    """One replica of two or three goes wrong, always or often; everybody must be served."""
    bad = _well(rng, dialect, next_fault=_sometimes(rng, rng.choice((0.5, 1.0)), kinds))
    good = [_well(rng, dialect) for _ in range(rng.randint(1, 2))]
    return Scenario(
        replicas=[bad, *good],
        clients=_clients(rng),
        conditions=_conditions(rng),
        allowed_whole=_EXPLICIT if {Kind.HANG, Kind.HANG_EARLY} & set(kinds) else None,
    )


# families


def calm(rng: Random) -> Scenario:
    """Nothing goes wrong."""
    return Scenario(
        replicas=[_well(rng, rng.choice(("roost", "vllm"))) for _ in range(rng.randint(1, 3))],
        clients=_clients(rng),
        conditions=_conditions(rng),
        is_sound=True,
    )


def refused(rng: Random) -> Scenario:
    """Nobody listens at one replica's address."""
    replicas = [_well(rng, listens=False), _well(rng)]
    return Scenario(replicas=replicas, clients=_clients(rng), conditions=_conditions(rng))


def broken_before_head(rng: Random) -> Scenario:
    """RST or FIN instead of an answer."""
    return _one_bad(rng, (Kind.RESET_EARLY, Kind.CLOSE_EARLY))


def statuses(rng: Random) -> Scenario:
    """429 and 5xx."""
    return _one_bad(rng, (Kind.STATUS,))


def silent_before_head(rng: Random) -> Scenario:
    """A request that is never answered."""
    return _one_bad(rng, (Kind.HANG_EARLY,))


def broken_mid_stream(rng: Random) -> Scenario:
    """RST or FIN in the middle of an answer."""
    return _one_bad(rng, (Kind.RESET, Kind.CLOSE))


def clean_end(rng: Random) -> Scenario:
    """An answer that ends properly, even with [DONE], but before it is complete."""
    return _one_bad(rng, (Kind.CLEAN_END, Kind.DONE_EARLY))


def error_event(rng: Random) -> Scenario:
    """The replica reports an error in the middle of a stream."""
    return _one_bad(rng, (Kind.ERROR_EVENT,))


def silent_mid_stream(rng: Random) -> Scenario:
    """A stream that stops, its connection open."""
    return _one_bad(rng, (Kind.HANG,))


def frozen(rng: Random) -> Scenario:
    """SIGSTOP and SIGCONT of one replica."""
    strikes = [(rng.random() * 0.5, faults.draw(rng, (Kind.FREEZE,), duration_s=10.0))]
    return Scenario(
        replicas=[_well(rng, strikes=strikes), _well(rng), _well(rng)],
        clients=_clients(rng),
        conditions=_conditions(rng),
        allowed_whole=_EXPLICIT,
        polls_see=rng.random() < 0.5,
    )


def vanished(rng: Random) -> Scenario:
    """The network to one replica is gone for a while."""
    strikes = [(rng.random() * 0.5, faults.draw(rng, (Kind.VANISH,), duration_s=10.0))]
    return Scenario(
        replicas=[_well(rng, strikes=strikes), _well(rng), _well(rng)],
        clients=_clients(rng),
        conditions=_conditions(rng),
        allowed_whole=_EXPLICIT,
        polls_see=rng.random() < 0.5,
    )


def killed(rng: Random) -> Scenario:
    """SIGKILL of one replica, which comes back."""
    strikes = [(rng.random() * 0.5, faults.draw(rng, (Kind.KILL,), duration_s=2.0))]
    return Scenario(
        replicas=[_well(rng, strikes=strikes), _well(rng)],
        clients=_clients(rng),
        conditions=_conditions(rng),
        polls_see=rng.random() < 0.5,
    )


def failing_twice(rng: Random) -> Scenario:
    """The first two legs of every request fail; the third must do."""
    failed: dict[str, int] = {}
    kinds = (*faults.BEFORE_HEAD, *faults.MID_STREAM)

    def next_fault(body: Body, now: float) -> Fault:  # noqa: ARG001
        prompt = str(body.messages[1] if body.messages else (body.prompt or "").partition("|>")[0])
        failed[prompt] = failed.get(prompt, 0) + 1
        return faults.draw(rng, kinds) if failed[prompt] <= 2 else NO_FAULT

    return Scenario(
        replicas=[_well(rng, next_fault=next_fault) for _ in range(3)],
        clients=_clients(rng),
        conditions=_conditions(rng),
        allowed_whole=_EXPLICIT,
    )


def deadlines(rng: Random) -> Scenario:
    """Clients that say how long they wait; replicas that are slow, or silent."""
    scenario = _one_bad(rng, (Kind.HANG, Kind.HANG_EARLY, Kind.STALL, Kind.RESET))
    for plan in scenario.clients:
        for ask in plan.asks:
            ask.timeout_s = rng.choice((0.05, 0.5, 3.0))
    scenario.allowed = scenario.allowed_whole = _EXPLICIT
    return scenario


def all_failing(rng: Random) -> Scenario:
    """Every replica fails, always or often: only explicit ends."""
    kinds = (*faults.BEFORE_HEAD, *faults.MID_STREAM)
    share = rng.choice((0.5, 1.0))
    return Scenario(
        replicas=[
            _well(rng, next_fault=_sometimes(rng, share, kinds), listens=rng.random() < 0.8)
            for _ in range(rng.randint(1, 4))
        ],
        clients=_clients(rng),
        conditions=_conditions(rng),
        allowed=_EXPLICIT,
        max_wait_s=240.0,
    )


def leaving(rng: Random) -> Scenario:
    """Clients leave at any moment; replicas are well, or not."""
    scenario = _one_bad(rng, (*faults.BEFORE_HEAD, *faults.MID_STREAM))
    if rng.random() < 0.3:
        scenario.replicas = scenario.replicas[:1]
        scenario.allowed |= _EXPLICIT
        scenario.max_wait_s = 240.0
    for plan in scenario.clients:
        for ask in plan.asks:
            if rng.random() < 0.7:
                if rng.random() < 0.5:
                    ask.leaves_after_s = rng.random() ** 2
                else:
                    ask.leaves_after_bytes = rng.randrange(2000)
                ask.leaves_by_reset = rng.random() < 0.5
        if rng.random() < 0.15:
            plan.manner = _manner(rng, half_closes=True)
    # What else may happen on a half-closed connection, which counts as one that was left.
    scenario.allowed |= {Outcome.CUT, Outcome.BEHIND}
    scenario.allowed_whole = _EXPLICIT | {Outcome.CUT}
    return scenario


def slow_readers(rng: Random) -> Scenario:
    """Clients read slowly, buffers are small, one replica breaks off."""
    is_sound = rng.random() < 0.5
    scenario = _one_bad(rng, (Kind.NONE,) if is_sound else (Kind.RESET, Kind.CLOSE))
    scenario.is_sound = is_sound
    # Streams only: whole answers are written at once, however slowly they are read.
    scenario.clients = _clients(rng, stream=True)
    scenario.conditions = Conditions(
        latency_s=0.001, window_bytes=rng.choice((200, 1000)), buffer_scale=rng.choice((256, 1024))
    )
    for plan in scenario.clients:
        if rng.random() < 0.8:
            plan.manner = _manner(rng, reads_slowly_s=rng.choice((0.01, 0.2, 3.0)))
    return scenario


def draining(rng: Random) -> Scenario:
    """The router is asked to stop under load."""
    scenario = _one_bad(rng, (Kind.NONE, Kind.RESET))
    scenario.drains_at = rng.random() * 0.6
    for plan in scenario.clients:
        plan.manner = _manner(rng, pipelines=False, pauses_s=0.1)
    scenario.allowed = frozenset({Outcome.OK, Outcome.UNREACHED})
    if rng.random() < 0.3:  # streams that take longer than the drain: an explicit end
        for replica in scenario.replicas:
            replica.pace = Pace(ttft_s=0.5, itl_s=0.5)
        scenario.allowed |= _EXPLICIT
    return scenario


def flapping(rng: Random) -> Scenario:
    """Replicas die and come back again and again."""

    def strikes() -> list[tuple[float, Fault]]:
        at, found = rng.random(), []
        while at < 5.0:
            fault = faults.draw(rng, (Kind.KILL,), duration_s=0.5)
            found.append((at, fault))
            at += fault.duration_s + rng.random()
        return found

    plans = []
    for client in range(rng.randint(2, 5)):
        asks = _asks(rng, client * 10, 10)
        plans.append(ClientPlan(asks=asks, manner=_manner(rng, pauses_s=0.5, pipelines=False)))
    return Scenario(
        replicas=[_well(rng, strikes=strikes()), _well(rng, strikes=strikes()), _well(rng)],
        clients=plans,
        conditions=_conditions(rng),
        polls_see=True,
    )


def _steady(rng: Random) -> list[ClientPlan]:
    """Three clients that ask for short answers again and again, for about ten seconds."""
    return [
        ClientPlan(
            asks=_asks(rng, client * 100, 40, max_tokens=1, stream=True),
            manner=Manner(pauses_s=0.5, starts_at=rng.random()),
        )
        for client in range(3)
    ]


def ejected(rng: Random) -> Scenario:
    """A replica that always fails gets a few requests and then only probes."""
    kinds = rng.choice(((Kind.RESET_EARLY,), (Kind.HANG_EARLY,), (Kind.RESET,)))
    replicas = [_well(rng, next_fault=_sometimes(rng, 1.0, kinds)), _well(rng), _well(rng)]
    # Three until it is out, one more a client under way, and probes at 1, 3, 7, 15, 31 s; each
    # may be sent twice, on a kept connection that is then lost without a byte.
    return Scenario(replicas=replicas, clients=_steady(rng), most_legs_of_first=2 * (3 + 3 + 5))


def back_again(rng: Random) -> Scenario:
    """A replica fails for two seconds; then it is well, and used again."""

    def next_fault(body: Body, now: float) -> Fault:  # noqa: ARG001
        return Fault(kind=Kind.RESET_EARLY) if now < 2.0 else NO_FAULT

    pace = Pace(ttft_s=0.01, itl_s=0.01)  # the same for all, so that all are worth using
    replicas = [ReplicaPlan(next_fault=next_fault, pace=pace), *(ReplicaPlan(pace=pace),) * 2]
    return Scenario(replicas=replicas, clients=_steady(rng), first_is_back_at=2.0)


def retry_storm(rng: Random) -> Scenario:
    """The whole fleet says no, and clients try again as the SDK does."""
    plans = []
    for client in range(20):
        asks = _asks(rng, client * 10, 3, request_id=None)
        plans.append(ClientPlan(asks=asks, manner=_manner(rng, max_retries=2, pipelines=False)))
    return Scenario(
        replicas=[
            _well(rng, next_fault=_sometimes(rng, 1.0, (Kind.STATUS, Kind.RESET_EARLY)))
            for _ in range(4)
        ],
        clients=plans,
        conditions=_conditions(rng),
        allowed=_EXPLICIT,
        is_storm=True,
    )


def malformed(rng: Random) -> Scenario:
    """Bytes that are not HTTP, in heads and bodies."""
    return _one_bad(rng, (Kind.BAD_HEAD, Kind.BAD_CHUNK))


def harmless(rng: Random) -> Scenario:
    """What is unusual but no fault, on all replicas."""
    return Scenario(
        replicas=[
            _well(rng, next_fault=_sometimes(rng, 0.5, faults.HARMLESS, duration_s=0.4))
            for _ in range(2)
        ],
        clients=_clients(rng),
        conditions=Conditions(slice_share=0.0),
        is_sound=True,
    )


def idle_races(rng: Random) -> Scenario:
    """Replicas close kept connections just when the next request is on its way."""
    plans = _clients(rng, manner=_manner(rng, pauses_s=0.02, pipelines=False))
    replicas = [_well(rng) for _ in range(rng.randint(1, 2))]
    for plan in replicas:
        plan.style = Style(idle_close_s=rng.choice((0.0, 0.002, 0.01)))
    # One attempt must do: such a race says nothing of the replica.
    return Scenario(
        replicas=replicas, clients=plans, conditions=_conditions(rng), config={"max_attempts": 1}
    )


def foreign_engines(rng: Random) -> Scenario:
    """Engines that tell no token ids; continued by text."""
    kinds = (Kind.RESET, Kind.CLOSE, Kind.CLEAN_END, Kind.ERROR_EVENT)
    scenario = _one_bad(rng, kinds, dialect="vllm")
    scenario.is_counted = False
    return scenario


def mixed_fleet(rng: Random) -> Scenario:
    """Our engine and a foreign one: no exact continuation on the other; only explicit ends."""
    scenario = _one_bad(rng, faults.MID_STREAM)
    scenario.replicas[1] = _well(rng, "vllm")
    scenario.allowed = scenario.allowed_whole = _EXPLICIT
    scenario.is_counted = False
    for plan in scenario.clients:
        for ask in plan.asks:
            ask.max_tokens = None  # tokens are not counted across the two
    return scenario


def _moves(rng: Random, span_s: float) -> list[tuple[float, Move]]:
    """A replica leaves or drains and comes back, again and again."""
    moves, at = [], 0.0
    while at < span_s:
        at += rng.expovariate(2.0)
        away, back = rng.choice(((Move.LEAVE, Move.JOIN), (Move.DRAIN, Move.RETURN)))
        moves.append((at, away))
        if away is Move.DRAIN and rng.random() < 0.5:  # a pod that ends: first it drains
            at += rng.expovariate(4.0)
            moves.append((at, Move.LEAVE))
            back = Move.JOIN
        at += rng.expovariate(4.0)
        moves.append((at, back))
    return moves


def coming_and_going(rng: Random) -> Scenario:
    """Replicas join, drain and leave while requests run: each has one leg, which is whole."""
    movers = [_well(rng, moves=_moves(rng, 5.0)) for _ in range(rng.randint(1, 3))]
    return Scenario(
        replicas=[_well(rng), *movers],
        clients=_clients(rng),
        conditions=_conditions(rng),
        is_sound=True,
    )


def scaled_down(rng: Random) -> Scenario:
    """A replica leaves, and is killed before its last streams have ended; it may come back."""
    left_at, grace_s = rng.random() * 0.5, rng.random() * 0.2
    moves = [(left_at, Move.LEAVE)]
    if rng.random() < 0.5:
        moves.append((left_at + grace_s + 3.0, Move.JOIN))
    kill = faults.draw(rng, (Kind.KILL,), duration_s=2.0)
    return Scenario(
        replicas=[_well(rng, moves=moves, strikes=[(left_at + grace_s, kill)]), _well(rng)],
        clients=_clients(rng),
        conditions=_conditions(rng),
        polls_see=rng.random() < 0.5,
    )


def several_choices(rng: Random) -> Scenario:
    """n > 1: before the first event as ever, after it an explicit end."""
    scenario = _one_bad(rng, (*faults.BEFORE_HEAD, *faults.MID_STREAM))
    for plan in scenario.clients:
        for ask in plan.asks:
            ask.n = rng.choice((1, 2, 3))
    scenario.allowed = scenario.allowed_whole = _EXPLICIT
    scenario.is_counted = False  # what is lost after the last token is counted in events
    return scenario


def chaos(rng: Random) -> Scenario:
    """Everything at once."""
    kinds = (*faults.BEFORE_HEAD, *faults.MID_STREAM, *faults.HARMLESS, *faults.OF_HOST)
    replicas = [
        _well(
            rng,
            rng.choice(("roost", "roost", "vllm")),
            next_fault=_sometimes(rng, rng.choice((0.0, 0.1, 0.5)), kinds),
        )
        for _ in range(rng.randint(2, 5))
    ]
    scenario = Scenario(
        replicas=replicas,
        clients=_clients(rng),
        conditions=_conditions(rng),
        polls_see=rng.random() < 0.5,
        allowed=_EXPLICIT | {Outcome.CUT, Outcome.UNREACHED},
        drains_at=rng.random() * 3.0 if rng.random() < 0.2 else None,
        max_wait_s=240.0,
        is_counted=False,
    )
    for plan in scenario.clients:
        for ask in plan.asks:
            ask.max_tokens = None
            ask.leaves_after_s = rng.random() if rng.random() < 0.1 else None
            ask.n = 2 if rng.random() < 0.05 else 1
        plan.manner = _manner(rng, max_retries=rng.choice((0, 2)))
    return scenario


FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        calm,
        refused,
        broken_before_head,
        statuses,
        silent_before_head,
        broken_mid_stream,
        clean_end,
        error_event,
        silent_mid_stream,
        frozen,
        vanished,
        killed,
        failing_twice,
        deadlines,
        all_failing,
        leaving,
        slow_readers,
        draining,
        flapping,
        ejected,
        back_again,
        retry_storm,
        malformed,
        harmless,
        idle_races,
        foreign_engines,
        mixed_fleet,
        coming_and_going,
        scaled_down,
        several_choices,
        chaos,
    )
}
