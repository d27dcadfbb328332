"""The replicas of the fault matrix fail as they are told, and resume as the real ones do."""

from __future__ import annotations

import json

import aiohttp
import pytest

from roost_loadtest.fault_answer import Expected, Verdict
from roost_loadtest.fault_client import Client
from roost_loadtest.fault_replica import Fault, FaultyReplica
from roost_loadtest.fault_words import expected, request_body, words
from roost_wire import resume

COUNT = 12
PROMPT = "what is the tide?"


@pytest.fixture(params=["roost", "vllm"])
async def replica(request):
    replica = await FaultyReplica(request.param, first_s=0.001, pace_s=0.0).start()
    yield replica
    await replica.stop()


def wanted() -> Expected:
    return expected(PROMPT, COUNT, exact_usage=True)


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        (Fault.NONE, Verdict.OK),
        (Fault.RST_PRE, Verdict.CUT),
        (Fault.FIN_PRE, Verdict.CUT),
        (Fault.STATUS_500, Verdict.STATUS),
        (Fault.STATUS_503, Verdict.STATUS),
        (Fault.STATUS_429, Verdict.STATUS),
        (Fault.HANG_PRE, Verdict.HANG),
        (Fault.RST_HEAD, Verdict.CUT),
        (Fault.HANG_HEAD, Verdict.HANG),
        (Fault.RST_MID, Verdict.CUT),
        (Fault.FIN_MID, Verdict.CUT),
        (Fault.EOF_MID, Verdict.SILENT),
        (Fault.HANG_MID, Verdict.HANG),
        (Fault.RST_END, Verdict.CUT),
    ],
)
async def test_without_a_router_every_fault_is_felt(replica, fault, verdict):
    replica.fault = fault

    for _ in range(3):  # mid-stream faults come at another event each time
        outcome = await Client(replica.port).ask(
            request_body(PROMPT, COUNT), wanted(), patience_s=0.3
        )
        assert outcome.verdict is verdict, outcome.detail


async def test_an_error_event_is_followed_by_done_where_vllm_does_so(replica):
    replica.fault = Fault.ERROR_MID

    outcome = await Client(replica.port).ask(request_body(PROMPT, COUNT), wanted())

    is_vllm = replica.dialect == "vllm"
    assert outcome.verdict is (Verdict.ERROR_DONE if is_vllm else Verdict.ERROR)


async def test_a_dead_replica_refuses_and_comes_back_on_its_port(replica):
    await replica.stop()
    assert (await Client(replica.port).ask(request_body(PROMPT, 2))).verdict is Verdict.REFUSED

    await replica.start()

    outcome = await Client(replica.port).ask(request_body(PROMPT, COUNT), wanted())
    assert outcome.verdict is Verdict.OK


async def test_a_client_that_leaves_is_noticed(replica):
    replica.fault = Fault.HANG_HEAD

    outcome = await Client(replica.port).ask(request_body(PROMPT, COUNT), leave_after_s=0.05)

    while not replica.aborted_at:
        await Client(replica.port).ask({}, leave_after_s=0.01)
    assert outcome.verdict is Verdict.LEFT


async def reported_events(replica: FaultyReplica) -> list[tuple[list[int], str]]:
    """The answer as a router sees it: (token ids of the comment, text) of each event with both."""
    url = f"{replica.url}/v1/chat/completions"
    async with aiohttp.ClientSession(headers={resume.RESUMABLE: "1"}) as session:
        async with session.post(url, json=request_body(PROMPT, COUNT)) as answer:
            assert answer.headers[resume.SEED].isdigit()
            blocks = (await answer.text()).split("\n\n")
    found = []
    for block in blocks:
        if block.startswith(": roost "):
            comment, _, data = block.partition("\n")
            delta = json.loads(data.removeprefix("data: "))["choices"][0]["delta"]
            found.append((resume.read_comment(comment.encode()), delta["content"]))
    return found


async def test_ours_resumes_after_any_event_without_losing_or_repeating_a_character():
    replica = await FaultyReplica("roost", first_s=0.0, pace_s=0.0).start()
    events = await reported_events(replica)
    assert sum(len(ids) for ids, _ in events) == COUNT
    assert any(len(ids) > 1 for ids, _ in events)  # some text was held back
    whole = "".join(text for _, text in words(PROMPT, COUNT))

    for number in range(len(events) + 1):
        ids = [token_id for reported, _ in events[:number] for token_id in reported]
        shown = "".join(text for _, text in events[:number])
        body = request_body(PROMPT, COUNT)
        body[resume.FIELD] = {"token_ids": ids, "seed": 1234567}
        outcome = await Client(replica.port).ask(body)

        assert outcome.verdict is Verdict.OK
        assert shown + outcome.text == whole
        assert outcome.completion_tokens == COUNT
    await replica.stop()


async def test_ours_refuses_tokens_that_it_did_not_generate():
    replica = await FaultyReplica("roost", first_s=0.0, pace_s=0.0).start()
    events = await reported_events(replica)
    body = request_body(PROMPT, COUNT) | {
        resume.FIELD: {"token_ids": [events[0][0][0] + 1], "seed": 1234567}
    }

    outcome = await Client(replica.port).ask(body)

    assert (outcome.verdict, outcome.status) == (Verdict.STATUS, 400)
    await replica.stop()


async def test_vllms_continues_an_assistants_message_and_refuses_another_text():
    replica = await FaultyReplica("vllm", first_s=0.0, pace_s=0.0).start()
    tokens = [text for _, text in words(PROMPT, COUNT)]

    def continued(text: str, shown: int) -> dict:
        body = request_body(PROMPT, COUNT - shown)
        body["messages"] = [*body["messages"], {"role": "assistant", "content": text}]
        return body | {"continue_final_message": True, "add_generation_prompt": False}

    for shown in range(COUNT):
        outcome = await Client(replica.port).ask(continued("".join(tokens[:shown]), shown))
        assert outcome.text == "".join(tokens[shown:])
    wrong = await Client(replica.port).ask(continued("".join(tokens[:3])[:-1], 3))
    assert wrong.status == 400
    await replica.stop()
