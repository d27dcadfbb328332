"""What policies are told of replicas and prompt, as the placer fills it in."""

from __future__ import annotations

from random import Random

from xxhash import xxh3_64_intdigest

from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.text_chain import TEXT_BLOCK_BYTES
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placer
from roost_router.policy.round_robin import RoundRobin
from roost_wire.load_report import LoadReport

PROMPT = b"p" * 3 * TEXT_BLOCK_BYTES


def make_placer(*reports: LoadReport) -> Placer:
    index = PrefixIndex()
    fleet = Fleet(index, [f"http://127.0.0.1:{8101 + n}" for n in range(len(reports))])
    for replica, report in zip(fleet.replicas, reports, strict=True):
        fleet.answered(replica, ["m"], report)
    return Placer(index, fleet, RoundRobin, Random(0))


def seen(placer: Placer, prompt: bytes):
    placement = placer.place(RoutingFields("m", stream=True, prompt=prompt), 0.0)
    return placement, placement.candidates


def test_requests_in_flight_are_counted_before_and_after_their_first_byte():
    placer = make_placer(LoadReport(), LoadReport())
    placement, _ = seen(placer, PROMPT)

    _, second = seen(placer, PROMPT)
    placer.first_byte(placement, 1.0, streamed=True)
    _, third = seen(placer, PROMPT)

    assert [(1, 0), (0, 0)] == [(c.num_in_flight, c.num_decoding) for c in second]
    assert [(1, 1), (1, 0)] == [(c.num_in_flight, c.num_decoding) for c in third]


def test_kv_figures_are_the_report_s_and_zero_where_nobody_told():
    _, (told, silent) = seen(
        make_placer(LoadReport(kv_usage=0.25, kv_capacity_tokens=4096), LoadReport()), PROMPT
    )

    assert (told.kv_usage, told.kv_capacity_tokens) == (0.25, 4096)
    assert (silent.kv_usage, silent.kv_capacity_tokens) == (0.0, 0)


def test_prompts_that_share_their_first_block_share_their_key():
    placer = make_placer(LoadReport(), LoadReport())

    keys = [
        {c.prompt_key for c in seen(placer, prompt)[1]}
        for prompt in (PROMPT, PROMPT[:-1] + b"q", b"q" + PROMPT)
    ]

    assert keys[0] == keys[1] != keys[2]
    assert all(len(key) == 1 for key in keys)


def test_a_prompt_shorter_than_a_block_is_its_own_key():
    placer = make_placer(LoadReport(), LoadReport())
    short = PROMPT[: TEXT_BLOCK_BYTES - 1]

    assert seen(placer, short)[1][0].prompt_key == xxh3_64_intdigest(short)
    assert seen(placer, short[1:])[1][0].prompt_key != xxh3_64_intdigest(short)
