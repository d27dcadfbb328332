"""Which routers a replay takes, how they are started, what happens to one that is not there."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from roost.cli import main
from roost_loadtest.fault_routers import RouterKind
from roost_loadtest.fleet_sim.trace import Request, Trace
from roost_loadtest.local_processes import free_port
from roost_loadtest.peers import PeerError
from roost_loadtest.replay import dynamo_peer, routers
from roost_loadtest.replay.dynamo_peer import Engines
from roost_loadtest.replay.prompts import TraceText
from roost_loadtest.replay.routers import Choice, choose, leaving_out, start, turned

PROBE = b"GET / HTTP/1.1\r\n\r\n"


def program(folder: Path, name: str, script: str = "exit 3") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_router_that_is_not_here_is_left_out_with_a_line(tmp_path: Path):
    labels = ("roost", "smg:cache_aware", "vllm-router")

    choices, missing = choose(labels, {"vllm-router": program(tmp_path, "v"), "smg": None})

    assert [choice.label for choice in choices] == ["roost", "vllm-router"]
    assert [choice.policy for choice in choices] == ["", ""]
    assert missing == ["smg:cache_aware is left out: smg is not installed, and no path was given"]


def test_none_of_the_routers_is_an_error_that_says_which():
    with pytest.raises(ValueError, match="smg:random is left out: smg is not installed"):
        choose(["smg:random"], {"smg": None})


def test_rounds_in_which_nobody_is_left_are_empty():
    assert turned([], 3) == []


@pytest.mark.parametrize("label", ["apache", "nginx:ip_hash"])
def test_an_unknown_name_is_refused(label: str):
    with pytest.raises(ValueError, match="nginx"):
        choose([label], {})


def begin(choice: Choice, folder: Path, engines: Engines) -> None:
    with contextlib.ExitStack() as stack:
        start(stack, choice, engines, PROBE, folder)


def test_each_is_told_its_policy_its_replicas_and_its_port(tmp_path: Path):
    """The program writes down its options, and ends."""
    kind = RouterKind("vllm-router", str(program(tmp_path, "v", 'echo "$@" >&2; exit 3')), "0")

    with pytest.raises(PeerError) as failure:
        begin(
            Choice("v", kind, "kv_aware"), tmp_path, Engines([7001, 7002], [8001, 8002], 64, 9999)
        )

    said = str(failure.value)
    assert "--policy kv_aware --worker-urls http://127.0.0.1:7001 http://127.0.0.1:7002" in said
    assert "--kv-event-source http://127.0.0.1:7002=tcp://127.0.0.1:8002" in said
    assert "--kv-event-block-size 64" in said


def test_dynamo_gets_a_worker_before_each_engine(tmp_path: Path):
    """The program writes down what it is told as a worker, and ends."""
    script = 'echo "$DYN_FILE_KV" "$@" >&2; exit 3'
    kind = RouterKind("dynamo", str(program(tmp_path, "d", script)), "0")

    with pytest.raises(PeerError) as failure:
        begin(Choice("d", kind, "kv"), tmp_path, Engines([7001], [8001], 64, 6400))

    said = str(failure.value)
    assert "/discovery" in said
    assert '"engine": 7001, "events": 8001, "block_tokens": 64, "num_blocks": 100' in said


def test_dynamos_model_has_a_token_for_every_four_bytes_of_a_prompt(tmp_path: Path):
    requests = [Request(8 * n + 5, 1, tuple(range(n)), 0.0) for n in range(300)]
    text = TraceText(Trace("t", 8, requests))
    dynamo_peer.write_model(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))

    for number in (0, 1, 20, 299):
        prompt = text.prompt(number)
        ids = tokenizer.encode(prompt).ids
        assert len(ids) == requests[number].prompt_tokens
        assert 0 not in ids  # no unknown word
        assert "".join(tokenizer.id_to_token(token) for token in ids) == prompt


@pytest.mark.parametrize("name", ["vllm-router", "dynamo"])
def test_a_router_that_follows_caches_needs_something_to_follow(name: str, tmp_path: Path):
    kind = RouterKind(name, str(program(tmp_path, "v")), "0")

    with pytest.raises(PeerError, match="needs KV events"):
        begin(Choice("v", kind, "kv_aware"), tmp_path, Engines([7001], [], 64, 6400))


def test_a_peer_that_does_not_start_takes_no_further_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    peer = Choice("smg", RouterKind("smg", str(program(tmp_path, "s")), "0"), "")
    choices, rows = [peer], {"smg": []}

    with leaving_out(peer, choices, rows):
        begin(peer, tmp_path, Engines([free_port()], [], 64, 6400))

    assert (choices, rows) == ([], {})
    assert "smg is left out" in capsys.readouterr().err


def test_ours_must():
    ours = Choice("roost", RouterKind("roost", "python", ""), "")

    with pytest.raises(PeerError), leaving_out(ours, [ours], {}):
        raise PeerError("roost: has ended")


def test_another_begins_in_each_round():
    kind = RouterKind("roost", "", "")
    one, two, three = (Choice(str(number), kind, "") for number in range(3))

    assert [turned([one, two, three], number)[0] for number in range(4)] == [one, two, three, one]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "a TRACE is needed"),
        (["--engines", "roost", __file__], "take no TRACE"),
        (["--engines", "llama.cpp"], "--llama-cpp"),
        (["--engines", "vllm"], "--vllm-python"),
        ([__file__], "line 1"),
        ([__file__, "--router", "apache"], "apache"),
    ],
)
def test_wrong_options_are_explained(options: list[str], said: str):
    result = CliRunner().invoke(main, ["bench", "replay", *options])

    assert result.exit_code != 0
    assert said in result.output
    assert routers.OURS == "roost"
