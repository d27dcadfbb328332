"""A router that follows the KV events of two real engines routes by what they really have."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from kv_fleet import EVENTS, SMALL, ask, trusts, would_go
from processes import Process, get, make_client, metric, start_engine, start_router, until
from tokenizer_folders import smollm2_folder

from roost.cli import main


@pytest.fixture
def fleet():
    engines = [start_engine(*EVENTS, *SMALL), start_engine(*EVENTS, *SMALL)]
    model = make_client(engines[0].url).models.list().data[0].id
    tokenizer = ("--tokenizer", f"{model}={smollm2_folder()}")
    router, admin = start_router(*engines, options=tokenizer)
    yield engines, router, admin, model
    for process in (router, *engines):
        assert process.stop() == 0


def test_a_request_follows_its_prefix_where_only_events_told_that_it_is(fleet):
    engines, router, admin, model = fleet
    until(lambda: trusts(admin) == [["exact"], ["exact"]])
    _, headers = ask(router, model, "mill", "Who grinds?")
    home = headers["x-roost-replica"]
    (other,) = {"r0", "r1"} - {home}
    at_home, elsewhere = engines[int(home[1])], engines[int(other[1])]
    # The first prompt came before any event told the size of a block.
    ask(router, model, "mill", "Who grinds, and where?")
    until(lambda: would_go(admin, model, "mill", "Why?")["rows"][home]["is_told"])
    assert would_go(admin, model, "mill", "Why?")["replica"] == home

    # Behind the router's back the prefix leaves one replica, and comes to the other.
    for name in ("harbour", "vineyard"):
        ask(at_home, model, name, "Why?", 1400)
    ask(elsewhere, model, "mill", "What is ground?")
    until(lambda: would_go(admin, model, "mill", "Why?")["replica"] == other)
    after = would_go(admin, model, "mill", "Why?")["rows"]
    assert after[home]["matched_tokens"] == 0
    assert after[other]["matched_tokens"] > 500
    usage, headers = ask(router, model, "mill", "What is ground, and when?")

    assert headers["x-roost-replica"] == other
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached > 500
    # What is bound ends with a whole text block and a whole token block.
    assert 0 <= cached - int(headers["x-roost-matched-tokens"]) < 128


def test_a_router_that_starts_late_learns_what_replicas_have(fleet):
    engines, router, admin, model = fleet
    ask(engines[0], model, "mill", "Who grinds?")
    _, headers = ask(router, model, "mill", "What?")
    ask(router, model, "mill", "What then?")
    until(lambda: would_go(admin, model, "mill", "Why?")["rows"]["r0"]["is_told"])
    tokenizer = ("--tokenizer", f"{model}={smollm2_folder()}")
    second, second_admin = start_router(*engines, options=tokenizer)
    try:
        until(lambda: trusts(second_admin) == [["exact"], ["exact"]])
        ask(second, model, "mill", "Who?")
        until(lambda: would_go(second_admin, model, "mill", "Why?")["rows"]["r0"]["is_told"])
        rows = would_go(second_admin, model, "mill", "Why?")["rows"]
    finally:
        assert second.stop() == 0

    assert rows["r0"]["matched_tokens"] > 500  # nothing of this router's doing, maybe
    assert headers["x-roost-replica"] in rows


def test_the_admin_port_shows_what_is_known_from_events(fleet):
    _, router, admin, model = fleet
    until(lambda: trusts(admin) == [["exact"], ["exact"]])
    ask(router, model, "mill", "Who grinds?")
    until(lambda: metric(admin, "roost_router_kv_index_blocks") > 30)

    assert metric(admin, "roost_router_kv_stream_exact") == 2
    assert metric(admin, "roost_router_kv_batches_total") > 0
    assert metric(admin, "roost_router_kv_undecodable_total") == 0
    assert metric(admin, "roost_router_kv_index_bytes") > 0
    findings = json.loads(get(f"{admin}/fleet"))["findings"]
    assert not [f for f in findings if "KV events" in f["what"]]


def test_a_folder_without_a_tokenizer_is_refused_at_once(tmp_path):
    router = Process("route", "--replica", "http://127.0.0.1:9", "--tokenizer", f"m={tmp_path}")

    router.until_line("there is no tokenizer.json in")
    assert router.popen.wait(30) == 2
    assert router.stop() == 2


def test_a_tokenizer_folder_is_written_of_a_gguf_file(tmp_path):
    folder = tmp_path / "tokenizer"

    shown = CliRunner().invoke(main, ["tokenizer", "smollm2", str(folder)])

    assert shown.exit_code == 0, shown.output
    assert (folder / "tokenizer.json").read_bytes() == (
        smollm2_folder() / "tokenizer.json"
    ).read_bytes()


def test_what_is_no_model_has_no_tokenizer(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    shown = CliRunner().invoke(main, ["tokenizer", str(tmp_path / "model.gguf"), str(tmp_path)])

    assert shown.exit_code == 1
    assert "Error:" in shown.output


def test_a_start_tells_what_replicas_lack(fleet):
    engines, _, _, model = fleet
    router = Process(
        "route", *(engine.url for engine in engines), "--port", "0", "--admin-port", "0"
    )
    try:
        router.until_line(r"replica +server +model +KV tokens +block +load +KV events +continues")
        router.until_line(rf"r0 +roost +{model} +2,048 +16 +told +published +exactly")
        router.until_line("r1 publishes KV events that are not followed")
        router.until_line(f"pass --tokenizer {model}=FOLDER")
    finally:
        assert router.stop() == 0


def test_a_router_without_replicas_says_so():
    router = Process("route")

    router.until_line("no replica given: pass its URL")
    assert router.popen.wait(30) == 1
    assert router.stop() == 1
