"""Worker processes: what they answer, and what happens when they do not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import smollm2_folder, smollm2_tokenizer, write_folder

from roost_engine.chat import ChatTemplate
from roost_router.index.text_chain import text_chain
from roost_router.index.token_knowledge import Known, TokenKnowledge
from roost_router.openai_request import CHAT_PATH, COMPLETIONS_PATH, read_routing_fields
from roost_router.tokens import service as service_module
from roost_router.tokens.service import TokenizerStartError, TokenService
from roost_router.tokens.wire import Answer, Job
from roost_wire.kv_events import BlockStored, Tier
from roost_wire.token_chain import block_hashes

Start = Callable[..., Awaitable[TokenService]]


def completion(prompt: str | list[int] = "x", model: str = "m") -> Job:
    body = json.dumps({"model": model, "prompt": prompt}).encode()
    return Job(COMPLETIONS_PATH, body, model, [16])


class Answers:
    """What came, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, Answer]] = []
        self._came = asyncio.Event()

    def take(self, job: Job, context: Any, answer: Answer) -> None:
        self.all.append((context, answer))
        self._came.set()

    async def wait(self, number: int) -> None:
        async with asyncio.timeout(60):
            while len(self.all) < number:
                self._came.clear()
                await self._came.wait()


@pytest.fixture
async def answers() -> Answers:
    return Answers()


@pytest.fixture
async def start(answers) -> AsyncIterator[Start]:
    started: list[TokenService] = []

    async def start_one(folder: Path, **options: Any) -> TokenService:
        service = TokenService({"m": folder}, answers.take, **options)
        await service.start()
        started.append(service)
        return service

    yield start_one
    for service in started:
        await service.stop()


def children() -> set[int]:
    return {
        int(task.name)
        for task in Path("/proc").iterdir()
        if task.name.isdigit() and _is_our_worker(task)
    }


def _is_our_worker(task: Path) -> bool:
    try:
        parent = (task / "stat").read_text().rsplit(")", 1)[1].split()[1]
        return int(parent) == os.getpid() and b"tokens.worker" in (task / "cmdline").read_bytes()
    except OSError:
        return False


async def test_without_room_the_oldest_jobs_are_dropped_and_counted(answers, monkeypatch):
    monkeypatch.setattr(service_module, "_MAX_WAITING", 3)
    service = TokenService({"m": Path("unused")}, answers.take, num_workers=2)

    for number in range(10):
        service.submit(completion(), number)

    assert [context for _, context in service._waiting] == [4, 5, 6, 7, 8, 9]
    assert service.counts.dropped == 4


async def test_jobs_that_wait_are_bounded_in_bytes(answers, monkeypatch):
    monkeypatch.setattr(service_module, "_MAX_WAITING_BYTES", 1000)
    service = TokenService({"m": Path("unused")}, answers.take)

    for number in range(10):
        service.submit(completion("y" * 300), number)
    kept = service.num_waiting
    service.submit(completion("y" * 3000), "huge")

    assert kept == 3
    assert [context for _, context in service._waiting] == [7, 8, 9]
    assert service.counts.dropped == 8


@pytest.mark.e2e
async def test_two_turns_of_a_chat_are_found_where_the_replica_holds_them(start, answers):
    """Text of the router, tokens of the worker, and blocks of a replica meet."""
    knowledge = TokenKnowledge(1 << 24, 1 << 24)
    holder = knowledge.index.open_holder(hashes_are_chain=True)
    engine = smollm2_tokenizer()
    messages = [{"role": "user", "content": "apples and pears, " * 200}]
    tokens = engine.encode(ChatTemplate(engine.chat_template).render(messages))
    chain = block_hashes(tokens, 16)
    event = BlockStored(tuple(chain), None, tuple(tokens[: 16 * len(chain)]), 16, Tier.DEVICE)
    knowledge.index.apply(holder, event)
    service = await start(smollm2_folder())
    sent = json.dumps({"model": "m", "messages": messages}).encode()
    text = text_chain(read_routing_fields(CHAT_PATH, sent).prompt)

    assert knowledge.wants_tokens(text)
    service.submit(Job(CHAT_PATH, sent, "m", knowledge.block_sizes()), text)
    await answers.wait(1)
    [(context, answer)] = answers.all
    chains = {size: array("Q", packed) for size, packed in answer.token_chains.items()}
    knowledge.bind(context, chains, answer.num_tokens)

    messages += [
        {"role": "assistant", "content": "Indeed. " * 90},
        {"role": "user", "content": "And plums?"},
    ]
    again = json.dumps({"model": "m", "messages": messages}).encode()
    next_turn = text_chain(read_routing_fields(CHAT_PATH, again).prompt)
    found = knowledge.lookup(next_turn, 1)[holder]
    assert answer.num_prompt_tokens == len(tokens)
    assert found.matched_tokens == found.bound_tokens > 0.7 * len(tokens)
    assert not knowledge.wants_tokens(text)
    assert knowledge.wants_tokens(next_turn)
    other = knowledge.index.open_holder()
    knowledge.index.apply(other, BlockStored((1,), None, tuple(range(16)), 16, Tier.HOST))
    assert knowledge.lookup(next_turn, 1 << other) == {other: Known(0, found.bound_tokens)}


@pytest.mark.e2e
async def test_a_worker_that_is_killed_is_started_again(start, answers):
    service = await start(smollm2_folder())
    [first] = children()
    service.submit(completion([1] * 200), 0)
    await answers.wait(1)

    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(60):
        while service.counts.restarts == 0:  # it is noticed with the next job
            service.submit(completion([1] * 200), 1)
            await asyncio.sleep(0.02)
    service.submit(completion([1] * 200), 2)
    while answers.all[-1][0] != 2:
        await answers.wait(len(answers.all) + 1)

    assert service.counts.restarts == 1
    assert service.counts.lost <= 1
    assert answers.all[-1][1].error == ""
    assert children() != {first}
    await service.stop()
    assert children() == set()


@pytest.mark.e2e
async def test_a_job_that_takes_too_long_costs_its_worker_only(start, answers, tmp_path):
    template = "{% set n = range(99999) %}{% for i in n %}{% for j in n %}{% endfor %}{% endfor %}"
    folder = write_folder(tmp_path, (smollm2_folder() / "tokenizer.json").read_text(), template)
    service = await start(folder, job_s=0.3)
    messages = [{"role": "user", "content": "x"}]
    endless = json.dumps({"model": "m", "messages": messages}).encode()

    service.submit(Job(CHAT_PATH, endless, "m", [16]), "endless")
    async with asyncio.timeout(60):
        while service.counts.lost == 0:
            await asyncio.sleep(0.02)
    service.submit(completion(), "after")
    await answers.wait(1)

    assert [context for context, _ in answers.all] == ["after"]
    assert (service.counts.lost, service.counts.restarts) == (1, 1)


@pytest.mark.e2e
async def test_what_cannot_be_tokenised_is_answered_with_the_reason(start, answers):
    service = await start(smollm2_folder())

    service.submit(Job("/v1/embeddings", b'{"model": "m", "input": "x"}', "m", [16]))
    await answers.wait(1)

    assert "cache" in answers.all[0][1].error
    assert (service.counts.failed, service.counts.answered) == (1, 0)


@pytest.mark.e2e
async def test_a_folder_without_a_tokenizer_is_refused_at_the_start(start, tmp_path):
    with pytest.raises(TokenizerStartError, match=str(tmp_path)):
        await start(tmp_path, num_workers=2)
    assert children() == set()
