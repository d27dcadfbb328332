"""Each rung of the ladder, on requests placed by the real placer: what it says and when."""

from __future__ import annotations

from random import Random

import pytest

from roost_router.answer.phases import Answer
from roost_router.config import RouterConfig
from roost_router.fleet.fleet import Fleet
from roost_router.hit_ladder import (
    MAX_BLOCKS,
    MAX_BLOCKS_OF_A_MODEL,
    MAX_MODELS,
    HitLadder,
)
from roost_router.http.record import RequestRecord
from roost_router.index.prefix_index import PrefixIndex
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.policy.cost import CostPolicy
from roost_router.policy.round_robin import RoundRobin
from roost_router.rungs import RUNGS, Ladder
from roost_wire.load_report import LoadReport

LIMITS = RouterConfig(replicas=("http://127.0.0.1:8101",))
HUGE = 1 << 40


class Fleets:
    """A fleet of `num_replicas` whose requests end at once, one a second, counted in a ladder."""

    def __init__(self, num_replicas: int = 1, policy: type = CostPolicy, models=("m",)) -> None:
        index = PrefixIndex()
        fleet = Fleet(index, [f"http://127.0.0.1:{8101 + n}" for n in range(num_replicas)])
        for replica in fleet.replicas:
            fleet.answered(replica, models, LoadReport(kv_capacity_tokens=1 << 20))
        self.placer = Placer(index, fleet, policy, Random(1))
        self.ladder = HitLadder()
        self.now = 0.0

    def place(self, prompt: bytes, model: str = "m") -> Placement:
        self.now += 1.0
        fields = RoutingFields(model, stream=True, prompt=prompt)
        placement = self.placer.place(fields, self.now)
        self.placer.first_byte(placement, self.now, streamed=False)
        return placement

    def end(self, placement: Placement | None, cached_tokens: int | None = None, **more) -> None:
        answer = Answer(b"{}", LIMITS, None, 0.0)
        if placement is not None:
            answer.prompt_tokens = placement.prompt_bytes // 4
            self.placer.finish(placement, self.now)
        answer.cached_tokens = cached_tokens
        answer.num_resumes = more.pop("num_resumes", 0)
        fields = {"status": 200, "outcome": "ok", "model": "m", "lost_legs": (), **more}
        record = RequestRecord(
            b"id",
            answer=answer,
            placement=placement,
            first=placement,
            error_code=None,
            started_at=self.now - 0.5,
            duration_s=0.5,
            ttft_s=0.1,
            **fields,
        )
        self.ladder.add(record)

    def ask(self, *prompts: bytes, cached_tokens: int | None = None, model: str = "m") -> None:
        for prompt in prompts:
            self.end(self.place(prompt, model), cached_tokens)

    def recent(self, capacity_bytes: int = HUGE) -> Ladder:
        return self.ladder.ladder("m", capacity_bytes, self.now).recent


def prompt(seed: int, num_blocks: int = 8) -> bytes:
    return Random(seed).randbytes(256 * num_blocks)


def by_name(ladder: Ladder) -> dict[str, float | None]:
    return {rung.name: share for rung, share in zip(RUNGS, ladder.shares, strict=True)}


def losses(ladder: Ladder) -> dict[str, float | None]:
    return {rung.name: lost for rung, lost in zip(RUNGS, ladder.lost, strict=True)}


def test_a_prefix_is_new_once_and_ideally_a_hit_from_then_on():
    fleet = Fleets()

    fleet.ask(prompt(1), prompt(1), prompt(1, 4) + prompt(2, 4), prompt(3))

    ladder = fleet.recent()
    assert (ladder.num_requests, ladder.prompt_tokens) == (4, 4 * 512)
    assert by_name(ladder)["ideal"] == pytest.approx((1.0 + 0.5) / 4)
    assert losses(ladder)["ideal"] == pytest.approx(1 - (1.0 + 0.5) / 4)
    assert by_name(ladder)["known"] == by_name(ladder)["routed"]
    assert by_name(ladder)["known"] == pytest.approx((1.0 + 0.5) / 4, abs=0.01)


def test_what_is_less_than_a_block_counts_as_new():
    fleet = Fleets()

    fleet.ask(*[prompt(1, 2) + b"x" * 128] * 2)

    assert by_name(fleet.recent())["ideal"] == pytest.approx(512 / 640 / 2)


def test_memory_for_two_prompts_keeps_none_of_three_that_take_turns():
    fleet = Fleets()

    fleet.ask(*[prompt(seed) for _ in range(10) for seed in (1, 2, 3)])

    ladder = fleet.recent(capacity_bytes=2 * 2048)
    assert by_name(ladder)["ideal"] == pytest.approx(27 / 30)
    assert by_name(ladder)["capacity-bound"] == pytest.approx(0.0, abs=0.12)
    assert losses(ladder)["capacity-bound"] == pytest.approx(27 / 30, abs=0.12)
    assert ladder.doubled == pytest.approx(27 / 30)


def test_a_prefix_on_a_replica_that_is_not_chosen_is_known_and_not_routed():
    fleet = Fleets(2, RoundRobin)

    fleet.ask(*[prompt(1)] * 2)

    ladder = fleet.recent()
    assert by_name(ladder)["known"] == pytest.approx(0.5, abs=0.01)
    assert by_name(ladder)["routed"] == 0.0
    assert losses(ladder)["routed"] == by_name(ladder)["known"]


def test_what_replicas_report_is_the_last_rung():
    fleet = Fleets()

    fleet.ask(prompt(1), cached_tokens=0)
    fleet.ask(prompt(1), cached_tokens=128)

    ladder = fleet.recent()
    assert ladder.told_share == 1.0
    assert by_name(ladder)["delivered"] == 128 / 1024
    assert losses(ladder)["delivered"] == pytest.approx(0.5 - 128 / 1024, abs=0.01)


def test_a_replica_that_had_more_than_was_known_lost_nothing():
    fleet = Fleets()

    fleet.ask(prompt(1), cached_tokens=512)

    ladder = fleet.recent()
    assert (by_name(ladder)["delivered"], losses(ladder)["delivered"]) == (1.0, 0.0)


def test_requests_that_do_not_tell_are_left_out_of_the_last_rung_only():
    fleet = Fleets()

    fleet.ask(prompt(1))
    assert by_name(fleet.recent())["delivered"] is None
    assert losses(fleet.recent())["delivered"] is None
    fleet.ask(prompt(1))
    fleet.ask(prompt(1), cached_tokens=512)
    fleet.end(fleet.place(prompt(1)), 0, num_resumes=1)

    ladder = fleet.recent()
    assert (ladder.num_requests, ladder.told_share) == (4, 0.25)
    assert by_name(ladder)["delivered"] == 1.0
    assert by_name(ladder)["ideal"] == 0.75


def test_what_was_never_computed_is_not_counted():
    fleet = Fleets()
    never_begun = fleet.place(prompt(1))
    never_begun.first_byte_at = None

    fleet.end(None)
    fleet.end(never_begun)
    fleet.end(fleet.place(prompt(2)), status=400)
    assert fleet.ladder.models == []

    fleet.end(fleet.place(prompt(3)), status=200, outcome="client_gone")
    assert fleet.recent().num_requests == 1


def test_ten_minutes_are_recent_and_all_else_is_since_the_start():
    fleet = Fleets()
    fleet.ask(prompt(1))  # ends at 1.0

    for now, number in ((599.9, 1), (600.0, 0)):
        found = fleet.ladder.ladder("m", HUGE, now)
        assert (found.recent.num_requests, found.since_start.num_requests) == (number, 1)

    fleet.now = 700.0
    fleet.ask(prompt(1))
    found = fleet.ladder.ladder("m", HUGE, fleet.now)
    assert by_name(found.recent)["ideal"] == 1.0  # it was first asked for before these minutes
    assert by_name(found.since_start)["ideal"] == 0.5


def test_nothing_recent_is_no_hit_rate():
    fleet = Fleets()
    fleet.ask(prompt(1))

    found = fleet.ladder.ladder("m", HUGE, 5_000.0).recent

    assert set(found.shares) == set(found.lost) == {None}
    assert (found.num_requests, found.doubled) == (0, None)


def test_a_hit_on_one_model_is_none_on_another():
    fleet = Fleets(models=("m", "n"))

    fleet.ask(prompt(1), model="m")
    fleet.ask(prompt(2), prompt(2), model="n")

    assert fleet.ladder.models == ["m", "n"]
    shares = [
        by_name(fleet.ladder.ladder(model, HUGE, fleet.now).recent)["ideal"] for model in "mn"
    ]
    assert shares == [0.0, 0.5]


def test_models_share_the_sample_and_are_bounded():
    names = [f"m{number}" for number in range(MAX_MODELS + 1)]
    fleet = Fleets(models=names)
    samples = fleet.ladder._models

    for number, name in enumerate(names[:-1], 1):
        fleet.ask(prompt(1), model=name)
        sizes = {model.sample._max_blocks for model in samples.values()}
        assert sizes == {min(MAX_BLOCKS_OF_A_MODEL, MAX_BLOCKS // number)}

    fleet.ask(prompt(1), model=names[-1])
    assert fleet.ladder.models == names[:-1]


def test_the_sample_is_told():
    fleet = Fleets()
    for seed in range(300):
        fleet.ask(prompt(seed, 48))

    found = fleet.ladder.ladder("m", HUGE, fleet.now)

    assert found.sampled_share == 0.5
    assert by_name(found.recent)["ideal"] == pytest.approx(0.0, abs=0.03)
