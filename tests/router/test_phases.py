"""What a loss leads to in every phase, and how an answer is continued."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from roost_router.answer.phases import MAX_HELD_BYTES, Answer, Phase, Verdict
from roost_router.answer.resume import TEXT_DIALECTS, CannotResumeError
from roost_router.fleet.retry_budget import RetryBudget

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
LIMITS = SimpleNamespace(max_attempts=3, max_resumes=2)
SEED = 77


def make(fields: dict[str, Any] | None = None, deadline: float = 100.0) -> Answer:
    body = json.dumps({**CHAT, **(fields or {})}).encode()
    return Answer(body, LIMITS, RetryBudget(), deadline)


def event(text: str | None = None, reason: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
    return b"data: " + json.dumps({**chunk, "choices": [choice], **more}).encode() + b"\n\n"


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])


def streaming(answer: Answer, *events: bytes, seed: int | None = None) -> Answer:
    answer.begin()
    answer.head(200, is_stream=True, seed=seed)
    for each in events:
        answer.body(each)
    return answer


def nobody() -> bool:
    return False


def somebody() -> bool:
    return True


def read(data: bytes) -> list[Any]:
    payloads = [block.removeprefix(b"data: ") for block in data.split(b"\n\n") if block]
    return [p if p == b"[DONE]" else json.loads(p) for p in payloads]


def test_losses_before_the_first_event_are_tried_again_within_the_attempts():
    answer = make()
    for attempt in range(LIMITS.max_attempts):
        answer.begin()
        if attempt == 1:
            answer.head(200, is_stream=True, seed=None)  # a head alone binds nobody
            assert answer.body(b": keepalive\n\n") == b""
        last = attempt == LIMITS.max_attempts - 1
        assert answer.lost("gone", 1.0) is (Verdict.FAIL if last else Verdict.AGAIN)
    assert not answer.budget_is_spent


def test_comments_before_the_first_event_come_with_it():
    answer = streaming(make(), b": keepalive\n\n")
    assert answer.body(event("a")) == b": keepalive\n\n" + event("a")


def test_no_attempt_begins_after_the_deadline_or_without_budget():
    answer = make(deadline=10.0)
    answer.begin()
    assert answer.lost("gone", 10.0) is Verdict.FAIL

    budget = RetryBudget()
    while budget.try_withdraw(0.0):
        pass
    answer = Answer(b"{}", LIMITS, budget, 100.0)
    answer.begin()
    assert answer.lost("gone", 0.0) is Verdict.FAIL
    assert answer.budget_is_spent


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_status_that_another_may_do_better_is_tried_there_if_there_is_one(status):
    for others, verdict in ((somebody, Verdict.AGAIN), (nobody, Verdict.WHOLE)):
        answer = make()
        answer.begin()
        answer.head(status, is_stream=False, seed=None)
        assert answer.body(b"{}") == b""
        assert answer.end(0.0, others) == (verdict, b"")


@pytest.mark.parametrize("status", [200, 400, 404, 422, 501])
def test_other_statuses_are_the_answer(status):
    answer = make()
    answer.begin()
    answer.head(status, is_stream=False, seed=None)
    answer.body(b"{}")
    assert answer.end(0.0, somebody) == (Verdict.WHOLE, b"")
    assert answer.held == [b"{}"]


def test_a_whole_answer_is_held_up_to_a_limit_then_relayed():
    held = b"x" * MAX_HELD_BYTES
    answer = make()
    answer.begin()
    answer.head(200, is_stream=False, seed=None)
    assert answer.body(held) == b""
    assert answer.body(b"y") == held + b"y"
    assert answer.body(b"z") == b"z"
    assert answer.lost("gone", 0.0) is Verdict.CUT


def test_a_stream_that_says_done_is_complete_and_nothing_is_added():
    answer = streaming(make(), event("a"), event(reason="stop"), b"data: [DONE]\n\n")
    assert answer.end(0.0, nobody) == (Verdict.COMPLETE, b"")
    assert answer.closing() == b""
    assert answer.lost("gone", 0.0) is Verdict.COMPLETE


@pytest.mark.parametrize("wants_usage", [True, False])
def test_a_finished_stream_is_completed_without_its_replica(wants_usage):
    options = {"stream_options": {"include_usage": True}} if wants_usage else {}
    ids = (b": roost 1\n", b": roost 2 3\n")
    events = (ids[0] + event("a"), ids[1] + event("b"), event(reason="stop"))
    answer = streaming(make(options), *events, seed=SEED)
    answer.prompt_tokens, answer.cached_tokens = 9, 4

    assert answer.lost("gone", 0.0) is Verdict.COMPLETE

    events = read(answer.closing())
    assert events[-1] == b"[DONE]"
    if wants_usage:
        assert events[0]["usage"] == {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        assert events[0]["id"] == "c1"
        assert events[0]["choices"] == []
    assert len(events) == 1 + wants_usage


def test_an_unfinished_choice_of_several_is_no_complete_answer():
    answer = streaming(make({"n": 2}), event("a"), event(reason="stop"))
    assert answer.lost("gone", 0.0) is Verdict.RESUME
    with pytest.raises(CannotResumeError, match="several choices"):
        answer.next_body("roost")


def test_resumes_are_bounded():
    answer = streaming(make(), event("a"))
    assert answer.lost("gone", 0.0) is Verdict.RESUME
    for _ in range(LIMITS.max_resumes - 1):
        streaming(answer)
        assert answer.lost("gone", 0.0) is Verdict.RESUME
    streaming(answer)
    assert answer.lost("gone", 0.0) is Verdict.CUT


def test_an_exact_resume_carries_ids_and_seed_and_keeps_the_body():
    answer = streaming(make(), ROLE, b": roost 5 6\n" + event("a"), b": roost 7\n\n", seed=SEED)
    assert answer.lost("gone", 0.0) is Verdict.RESUME

    body = answer.next_body("roost")

    assert body is not None
    assert json.loads(body) == {**CHAT, "roost_resume": {"token_ids": [5, 6, 7], "seed": SEED}}
    assert answer.dialects()[0] == {"roost"}


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp", "roost"])
def test_a_resume_by_text_continues_the_message_and_the_limits(dialect):
    asked = {"max_tokens": 10, "min_tokens": 1, "temperature": 0}
    answer = streaming(make(asked), ROLE, event("Hel"), event("lo"))
    assert answer.lost("gone", 0.0) is Verdict.RESUME

    body = json.loads(answer.next_body(dialect) or b"")

    assert body["messages"][-1] == {"role": "assistant", "content": "Hello"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["max_tokens"], body["min_tokens"], body["temperature"]) == (8, 0, 0)


@pytest.mark.parametrize("dialect", ["sglang", "someone"])
def test_a_completion_is_resumed_by_its_prompt_wherever(dialect):
    text = {"index": 0, "text": "lo", "finish_reason": None}
    body = json.dumps({"model": "m", "prompt": "Hel", "stream": True}).encode()
    answer = streaming(Answer(body, LIMITS, RetryBudget(), 9.0), event(choices=[text]))
    answer.lost("gone", 0.0)

    assert answer.dialects() == (TEXT_DIALECTS, None)
    assert json.loads(answer.next_body(dialect) or b"")["prompt"] == "Hello"


@pytest.mark.parametrize(
    "asked",
    [{"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"tool_choice": "required"},
     {"guided_json": {}, "structured_outputs": {"json": {"a": 1}}}],
)  # fmt: skip
def test_what_text_cannot_continue_is_refused(asked):
    answer = streaming(make(asked), event("a"))
    answer.lost("gone", 0.0)
    with pytest.raises(CannotResumeError):
        answer.next_body("vllm")


@pytest.mark.parametrize("dialect", ["", "openai", "someone"])
def test_unknown_servers_are_not_asked_to_continue(dialect):
    answer = streaming(make(), event("a"))
    answer.lost("gone", 0.0)
    with pytest.raises(CannotResumeError, match="cannot continue"):
        answer.next_body(dialect)
    assert answer.dialects() == (TEXT_DIALECTS,)


def test_nothing_but_a_role_is_simply_asked_again():
    answer = streaming(make(), ROLE)
    answer.lost("gone", 0.0)
    assert answer.dialects() == (None,)
    assert json.loads(answer.next_body("someone") or b"") == CHAT


def test_a_spent_limit_ends_the_answer_as_a_length():
    answer = streaming(make({"max_tokens": 2}), event("a"), event("b"))
    answer.lost("gone", 0.0)
    assert answer.next_body("vllm") is None

    first, done = read(answer.closing(is_exhausted=True))

    assert first["choices"][0]["finish_reason"] == "length"
    assert first["id"] == "c1"
    assert done == b"[DONE]"


def test_the_second_leg_reads_as_the_first_continued():
    options = {"stream_options": {"include_usage": True}}
    answer = streaming(make(options), ROLE, event("a"), event("b"))
    answer.prompt_tokens, answer.cached_tokens = 9, 4
    answer.lost("gone", 0.0)
    answer.begin()
    answer.head(200, is_stream=True, seed=None)

    other = {"id": "c2", "created": 6, "system_fingerprint": "f"}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    relayed = b"".join(
        answer.body(data)
        for data in (
            event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}], **other),
            event("c", **other),
            event(reason="stop", **other),
            event(choices=[], usage=usage, **other),
            b"data: [DONE]\n\n",
        )
    )

    events = read(relayed)
    assert [e["id"] for e in events[:-1]] == ["c1"] * 3
    assert [e["created"] for e in events[:-1]] == [5] * 3
    assert not any("role" in c["delta"] for e in events[:-1] for c in e["choices"])
    assert events[2]["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert events[-1] == b"[DONE]"
    assert answer.end(0.0, nobody) == (Verdict.COMPLETE, b"")


def test_a_refused_resume_is_another_loss():
    answer = streaming(make(), event("a"))
    answer.lost("gone", 0.0)
    answer.begin()
    answer.head(400, is_stream=False, seed=None)
    answer.body(b'{"error": {}}')
    assert answer.end(0.0, somebody)[0] is Verdict.RESUME
    assert answer.phase is Phase.STREAMING


def test_an_event_that_never_ended_is_not_part_of_what_is_continued():
    answer = streaming(make(), event("a"), event("b")[:-5], seed=None)
    answer.lost("gone", 0.0)
    assert json.loads(answer.next_body("vllm") or b"")["messages"][-1]["content"] == "a"


def test_of_an_odd_body_nothing_is_known_but_the_end_is_told():
    answer = streaming(Answer(b'{"model":"m","x":"\xff"}', LIMITS, RetryBudget(), 9.0), event("a"))
    assert answer.lost("gone", 0.0) is Verdict.RESUME
    with pytest.raises(CannotResumeError):
        answer.next_body("vllm")
