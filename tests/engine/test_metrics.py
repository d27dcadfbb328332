"""What a scrape tells of scheduler and pool: each series where it is counted, nothing before."""

from __future__ import annotations

from hand_engine import HandEngine
from prometheus_client.parser import text_string_to_metric_families

from roost_engine.core import EngineCore
from roost_engine.metrics import EngineMetrics


def scrape(engine: HandEngine) -> dict[str, float]:
    """Values by name, without the prefix of our own."""
    metrics = EngineMetrics("fake", EngineCore(engine.scheduler, engine.model))
    families = text_string_to_metric_families(metrics.render().decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        sample.name.removeprefix("roost_engine:"): sample.value
        for sample in samples
        if sample.labels == {"model_name": "fake", "engine": "0"}
    }


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    return [(seed * 17 + index * 7) % 49 for index in range(num_tokens)]


def test_a_replica_that_has_done_nothing_counts_nothing() -> None:
    values = scrape(HandEngine(num_blocks=8, num_host_blocks=8))

    assert values["free_blocks"] == 8
    for name in (
        "prefill_tokens_total",
        "restored_tokens_total",
        "host_blocks_used",
        "expired_requests_total",
        "broken_pins_total",
    ):
        assert values[name] == 0, name


def test_blocks_in_host_memory_and_tokens_restored_from_it_are_counted() -> None:
    engine = HandEngine(num_blocks=8, num_host_blocks=8)
    engine.add("first", prompt_of(20, 1))
    engine.run()
    engine.add("other", prompt_of(24, 2))
    engine.run()
    before = scrape(engine)
    assert before["host_blocks_used"] == engine.pool.num_host_used > 0
    assert before["restored_tokens_total"] == 0
    assert before["prefill_tokens_total"] == 44

    again = engine.add("again", [*prompt_of(20, 1), 3])
    engine.run()

    after = scrape(engine)
    assert again.num_cached_tokens == 20
    assert 0 < after["restored_tokens_total"] <= 20
    assert after["restored_tokens_total"] % engine.pool.block_size == 0
    assert after["prefill_tokens_total"] == 45


def test_requests_whose_deadline_passed_are_counted() -> None:
    engine = HandEngine()
    for deadline_s in (1.0, 2.0, 3.0):
        engine.add(f"until {deadline_s}", prompt_of(8, 1), deadline_s=deadline_s)

    engine.scheduler.expire(2.0)

    assert scrape(engine)["expired_requests_total"] == 2


def test_pins_given_up_for_a_request_are_counted_and_released_ones_are_not() -> None:
    engine = HandEngine(num_blocks=8, block_size=4)
    for seed in (1, 2):
        engine.add(f"warm{seed}", prompt_of(8, seed), max_tokens=1)
    engine.run()
    engine.scheduler.pins.pin("released", prompt_of(8, 1), until_s=20.0)
    engine.scheduler.pins.pin("broken", prompt_of(8, 2), until_s=10.0)
    assert engine.scheduler.pins.release("released")
    assert scrape(engine)["broken_pins_total"] == 0

    engine.add("large", prompt_of(24, 3), max_tokens=8)
    engine.run()

    assert scrape(engine)["broken_pins_total"] == 1
