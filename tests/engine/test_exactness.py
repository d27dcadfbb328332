"""The keystone: a request's tokens depend on its prompt, its parameters and its seed only.

One request is answered alone and undisturbed; then under every combination of company, chunking,
cache, preemption and change of replica, greedy and sampled. The tokens must be the same ones.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from native import needs_native
from tiny_models import VOCAB, hf_model, load_saved, stored_as

from roost_engine.blocks import BlockPool
from roost_engine.config import CacheConfig, SchedulerConfig
from roost_engine.interruption import StepInterruptedError
from roost_engine.loader import LoadedModel, load_model
from roost_engine.native_runner import NativeRunner, WeightFormat
from roost_engine.request import FinishReason, Request, SamplingParams
from roost_engine.sampling import sample
from roost_engine.scheduler import Scheduler
from roost_kernels.cpu_sampling import sample_rows

pytestmark = [pytest.mark.model, needs_native]  # much computing, if mostly on tiny models

CACHE = CacheConfig(num_blocks=640, block_size=16)
NUM_TOKENS = 24
PROMPT_TOKENS = 100
_MOVE_AFTER = 9  # tokens
_SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 41}
COMPANY = 15


class Replica:
    """Scheduler and runner, stepped by hand."""

    def __init__(self, runner: NativeRunner, *, max_step_tokens: int = 1024) -> None:
        self.runner = runner
        self.pool = BlockPool(CACHE.num_blocks, CACHE.block_size)
        limits = SchedulerConfig(max_step_tokens=max_step_tokens, max_running=COMPANY + 1)
        self.scheduler = Scheduler(limits, self.pool, frozenset())

    def step(self) -> None:
        step = self.scheduler.schedule()
        requests = step.sampling
        try:
            logits = self.runner.forward(step.chunks)
        except StepInterruptedError:
            self.scheduler.discard()
            self.scheduler.check()
            return
        tokens = sample(
            logits,
            [request.sampling for request in requests],
            [len(request.token_ids) for request in requests],
            draw=sample_rows,
        )
        self.scheduler.update(step, tokens)
        self.scheduler.check()

    def finish(self, request: Request, *, preempts: bool = False) -> list[int]:
        """The output of a request that is in the scheduler; `preempts`: after each step."""
        while request.finish_reason is None:
            self.step()
            if preempts and request in self.scheduler.running:
                self.scheduler._preempt(request)
        assert request.finish_reason is FinishReason.LENGTH
        return request.token_ids[request.num_prompt_tokens :]

    def answer(
        self, prompt: Sequence[int], *, preempts: bool = False, **options: float
    ) -> list[int]:
        request = _request("asked", prompt, **options)
        self.scheduler.add(request)
        return self.finish(request, preempts=preempts)

    def add_company(self, prompt: Sequence[int]) -> None:
        """Other requests, some with the same beginning, greedy and sampled, of all lengths."""
        for number in range(COMPANY):
            own = [(5 * number + 3 * i) % VOCAB for i in range(3 + 5 * number)]
            shared = list(prompt[: 16 * (number % 4)])
            options = _SAMPLED | {"seed": number} if number % 2 else {}
            self.scheduler.add(
                _request(f"company-{number}", shared + own, max_tokens=4 + 4 * number, **options)
            )


def _request(request_id: str, prompt: Sequence[int], **options: float) -> Request:
    settings = {"max_tokens": NUM_TOKENS, "temperature": 0.0} | options
    return Request(request_id, prompt, SamplingParams(**settings), arrival_s=0.0)  # type: ignore[arg-type]


class Subject:
    """A model under test with what it answers undisturbed."""

    def __init__(self, model: LoadedModel, weights: WeightFormat, prompt: Sequence[int]) -> None:
        self.prompt = prompt
        self.runners = [
            NativeRunner(model, CACHE, weights=weights, max_step_tokens=1024, num_threads=threads)
            for threads in (2, 1)
        ]
        self._answers: dict[str, list[int]] = {}

    def replica(self, *, max_step_tokens: int = 1024, which: int = 0) -> Replica:
        """A fresh scheduler and pool; blocks still hold what others left in them."""
        return Replica(self.runners[which], max_step_tokens=max_step_tokens)

    def expected(self, sampling: dict[str, float]) -> list[int]:
        key = repr(sampling)
        if key not in self._answers:
            self._answers[key] = self.replica().answer(self.prompt, **sampling)
        return self._answers[key]


@pytest.fixture(
    scope="module",
    params=[
        "tiny llama, float32",
        "tiny gemma3, bfloat16",
        "tiny qwen2 q5_0, stored",
        "tiny qwen3 q4_0, stored",
        "smollm2, stored",
    ],
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name, weights = request.param.split(", ")
    if name == "smollm2":
        model = load_model("smollm2")
        text = Path(__file__).read_text(encoding="utf-8")
        return Subject(model, weights, model.tokenizer.encode(text)[:PROMPT_TOKENS])
    changes = {"head_dim": 32, "intermediate_size": 128, "hidden_size": 64}
    _, family, *encodings = name.split()
    model = load_saved(hf_model(family, **changes), tmp_path_factory.mktemp("tiny"))
    prompt = [(i * i + 7 * i) % VOCAB for i in range(PROMPT_TOKENS)]
    return Subject(stored_as(model, *encodings) if encodings else model, weights, prompt)


GREEDY_AND_SAMPLED = pytest.mark.parametrize("sampling", [{}, _SAMPLED], ids=["greedy", "sampled"])
MATRIX = list(
    itertools.product(("alone", "batch"), (7, 64, 1024), ("cold", "full hit", "partial hit"))
)


@GREEDY_AND_SAMPLED
@pytest.mark.parametrize(("company", "max_chunk", "cache"), MATRIX)
def test_company_chunks_and_cache_change_no_token(
    subject: Subject, sampling: dict[str, float], company: str, max_chunk: int, cache: str
) -> None:
    # Beside a full batch of decodes, `max_chunk` tokens of the budget are left.
    replica = subject.replica(max_step_tokens=max_chunk + COMPANY + 1)
    if cache == "full hit":
        replica.answer(subject.prompt)
    elif cache == "partial hit":
        replica.answer([*subject.prompt[:40], 1, 2, 3])
    if company == "batch":
        replica.add_company(subject.prompt)
        for _ in range(3):
            replica.step()

    assert replica.answer(subject.prompt, **sampling) == subject.expected(sampling)
    hits = replica.scheduler.counters.prefix_hits_tokens
    assert hits > 0 or (cache, company) == ("cold", "alone")


@GREEDY_AND_SAMPLED
@pytest.mark.parametrize("company", ["alone", "batch"])
def test_preemption_after_every_step_changes_no_token(
    subject: Subject, sampling: dict[str, float], company: str
) -> None:
    replica = subject.replica()
    if company == "batch":
        replica.add_company(subject.prompt)

    tokens = replica.answer(subject.prompt, preempts=True, **sampling)

    assert tokens == subject.expected(sampling)
    assert replica.scheduler.counters.preemptions >= NUM_TOKENS - 1


@GREEDY_AND_SAMPLED
def test_another_replica_goes_on_with_the_same_tokens(
    subject: Subject, sampling: dict[str, float]
) -> None:
    expected = subject.expected(sampling)
    emitted = subject.replica().answer(subject.prompt, max_tokens=_MOVE_AFTER, **sampling)

    other = subject.replica(which=1)
    other.add_company(subject.prompt)
    rest = other.answer(
        [*subject.prompt, *emitted], max_tokens=NUM_TOKENS - _MOVE_AFTER, **sampling
    )

    assert emitted + rest == expected


@contextmanager
def interrupts(runner: NativeRunner) -> Iterator[None]:
    """At random moments of the steps computed meanwhile, from another thread."""
    is_over = threading.Event()
    rng = random.Random(3)

    def go_on() -> None:
        while not is_over.wait(rng.choice([0.0001, 0.001, 0.01]) * rng.random()):
            runner.interrupt()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@GREEDY_AND_SAMPLED
@pytest.mark.parametrize("max_chunk", [7, 1024])
def test_interrupted_steps_change_no_token(
    subject: Subject, sampling: dict[str, float], max_chunk: int
) -> None:
    num_interrupted = 0
    while num_interrupted < 10:
        replica = subject.replica(max_step_tokens=max_chunk + COMPANY + 1)
        replica.add_company(subject.prompt)
        request = _request("asked", subject.prompt, **sampling)
        replica.scheduler.add(request)
        while request.finish_reason is None:
            with interrupts(replica.runner):
                for _ in range(5):
                    replica.step()
            replica.step()  # by itself, so that there is progress

        tokens = request.token_ids[request.num_prompt_tokens :]
        assert tokens == subject.expected(sampling)
        num_interrupted += replica.scheduler.counters.interrupted_steps


def test_seeds_matter(subject: Subject) -> None:
    """Without this, equal tokens would prove nothing about sampling."""
    other = _SAMPLED | {"seed": 42}

    assert subject.replica().answer(subject.prompt, **other) != subject.expected(_SAMPLED)
