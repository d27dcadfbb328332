"""Receipts over real sockets: what the admin port and `roost explain` say of requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from click.testing import CliRunner

from roost.cli import main
from roost_router.keys import make_key

PROMPT = "canary of a prompt, told again and again. " * 100


async def complete(router, body=None, **headers: str) -> tuple[int, str]:
    """Status and request id of an answer, read to its end."""
    body = {"model": "m", "prompt": PROMPT, **(body or {})}
    url = "http://{}:{}/v1/completions".format(*router.address)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession(headers=names) as session:
        async with session.post(url, json=body) as answer:
            await answer.read()
            return answer.status, answer.headers["x-request-id"]


async def get(router, path: bytes, key: str | None = None) -> tuple[int, dict]:
    """One page of the admin port; `path` goes out byte by byte."""
    authorization = b"" if key is None else b"authorization: Bearer %b\r\n" % key.encode()
    reader, writer = await asyncio.open_connection(*router.admin_address)
    writer.write(
        b"GET %b HTTP/1.1\r\nhost: a\r\nconnection: close\r\n%b\r\n" % (path, authorization)
    )
    async with asyncio.timeout(5):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split(b" ")[1]), json.loads(body)


async def explain(router, request_id: str) -> dict:
    status, told = await get(router, b"/explain/" + request_id.encode())
    assert status == 200, told
    return told


def admin_url(router) -> str:
    return "http://{}:{}".format(*router.admin_address)


async def run(*arguments: str):
    return await asyncio.to_thread(CliRunner().invoke, main, ["explain", *arguments])


async def test_a_request_is_explained(start_router, replicas):
    router = await start_router(*replicas)
    replicas[0].cached_tokens = replicas[1].cached_tokens = 64
    before = datetime.now(UTC)
    _, first_id = await complete(router)
    _, request_id = await complete(router, {"stream": True}, x_request_id="mine")

    told = await explain(router, request_id)

    assert (told["id"], told["model"]) == ("mine", "m")
    assert (told["outcome"], told["status"], told["error"]) == ("ok", 200, None)
    assert (told["prompt_tokens"], told["cached_tokens"]) == (100, 64)
    assert 0 <= told["ttft_s"] <= told["duration_s"]
    slack = timedelta(milliseconds=1)
    assert before - slack <= datetime.fromisoformat(told["at"]) <= datetime.now(UTC) + slack
    (attempt,) = told["attempts"]
    home = (await explain(router, first_id))["attempts"][0]["replica"]
    assert (attempt["replica"], attempt["lost"], attempt["then"]) == (home, None, None)
    rows = {row["replica"]: row for row in attempt["candidates"]}
    assert set(rows) == {"r0", "r1"}
    (other,) = rows.keys() - {home}
    assert rows[home]["matched_tokens"] > rows[home]["uncached_tokens"]
    assert rows[other]["matched_tokens"] == 0
    behind_s = rows[other]["cost_s"] - rows[home]["cost_s"]
    assert attempt["runner_up"] == {"replica": other, "behind_s": pytest.approx(behind_s)}
    assert behind_s > 0


async def test_a_receipt_shows_the_same_date_each_time(start_router, replicas):
    router = await start_router(replicas[0])
    _, request_id = await complete(router)

    assert len({(await explain(router, request_id))["at"] for _ in range(20)}) == 1


async def test_what_was_not_streamed_has_no_time_to_first_token(start_router, replicas):
    router = await start_router(*replicas)
    _, request_id = await complete(router)

    assert (await explain(router, request_id))["ttft_s"] is None


async def test_a_retried_request_shows_both_attempts(start_router, replicas):
    router = await start_router(*replicas)
    for replica in replicas:
        replica.fault = "text500"
    status, failed_id = await complete(router)
    replicas[1].fault = None
    _, request_id = await complete(router, {"prompt": "other"})
    while len((await explain(router, request_id))["attempts"]) == 1:  # r1 was first
        _, request_id = await complete(router, {"prompt": request_id})

    first, second = (await explain(router, request_id))["attempts"]
    assert (first["replica"], first["lost"], first["then"]) == ("r0", "status 500", "retried")
    assert (second["replica"], second["lost"], second["then"]) == ("r1", None, None)
    assert [row["replica"] for row in second["candidates"]] == ["r1"]
    assert second["runner_up"] is None
    assert 0 <= first["at_s"] <= second["at_s"]

    told = await explain(router, failed_id)
    assert (told["outcome"], told["status"]) == ("server_error", status) == ("server_error", 500)
    assert len(told["attempts"]) == 2
    assert told["attempts"][0]["then"] == "retried"


async def test_a_replica_that_is_gone_is_named_with_the_reason(start_router, replicas):
    router = await start_router(*replicas, max_attempts=2, poll_interval_s=60.0)
    for replica in replicas:
        await replica.stop()
    status, request_id = await complete(router)

    told = await explain(router, request_id)

    assert told["status"] == status >= 500
    assert told["error"] in {"upstream_error", "no_replica"}
    assert {attempt["lost"] for attempt in told["attempts"]} == {"unreachable"}


@pytest.mark.parametrize(
    ("more", "outcome", "ends"),
    [
        ({}, "ok", [("cut", "resumed"), (None, None)]),
        ({"n": 2}, "cut", [("cut", "resumed"), ("cannot_resume", "not sent")]),
    ],
)
async def test_a_broken_stream_shows_where_it_went_on_or_why_not(
    start_router, replicas, more, outcome, ends
):
    router = await start_router(*replicas)
    replicas[0].fault = "eof"
    url = "http://{}:{}/v1/completions".format(*router.address)
    for number in range(20):
        body = {"model": "m", "prompt": f"{number} {PROMPT}", "stream": True, **more}
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            with contextlib.suppress(aiohttp.ClientPayloadError):
                await answer.read()
        told = await explain(router, answer.headers["x-request-id"])
        if told["attempts"][0]["replica"] == "r0":
            break

    assert told["outcome"] == outcome
    assert [(a["lost"], a["then"]) for a in told["attempts"]] == ends
    assert [a["replica"] for a in told["attempts"]] == ["r0", "r1"]


async def test_a_stream_that_cannot_be_continued_is_told_as_cut(start_router, replicas):
    router = await start_router(replicas[0], max_resumes=0)
    replicas[0].fault = "eof"
    url = "http://{}:{}/v1/completions".format(*router.address)
    body = {"model": "m", "prompt": "x", "stream": True}
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with session.post(url, json=body) as answer:
                await answer.read()

    told = await explain(router, answer.headers["x-request-id"])

    assert (told["outcome"], told["error"]) == ("cut", "upstream_lost")
    (attempt,) = told["attempts"]
    assert attempt["then"] == "cut"


async def test_a_model_that_nobody_serves_is_explained_without_attempts(start_router, replicas):
    router = await start_router(*replicas)
    _, request_id = await complete(router, {"model": "nobody's" + "x" * 1000})

    told = await explain(router, request_id)

    assert (told["status"], told["error"], told["attempts"]) == (404, "model_not_found", [])
    assert told["model"] == ("nobody's" + "x" * 1000)[:128]


async def test_prompts_and_keys_are_never_told(start_router, replicas, tmp_path):
    key, line = make_key(b"k" * 32)
    (tmp_path / "keys").write_text(f"{line} alice\n")
    router = await start_router(*replicas, api_keys_file=tmp_path / "keys")
    status, request_id = await complete(router, authorization=f"Bearer {key}")
    assert status == 200

    told = json.dumps(await explain(router, request_id))

    assert "canary" not in told
    assert key not in told
    assert b"canary" not in router.service.receipts.get(request_id.encode())


async def test_the_admin_key_is_asked_for(start_router, replicas, tmp_path):
    key, line = make_key(b"k" * 32)
    (tmp_path / "keys").write_text(f"{line} operator\n")
    router = await start_router(*replicas, admin_keys_file=tmp_path / "keys")
    _, request_id = await complete(router)
    path = b"/explain/" + request_id.encode()

    assert (await get(router, path))[0] == 401
    assert (await get(router, path, "sk-wrong"))[0] == 401
    assert (await get(router, b"/explain/unknown"))[0] == 401  # nor which ids there are
    assert (await get(router, path, key))[0] == 200


@pytest.mark.parametrize(
    "quoted",
    [
        b"",
        b"unknown",
        b"mine/more",
        b"%6Dine%00",
        b"%",
        b"%zz",
        b"%ff%fe",
        b"..%2f..%2fmetrics",
        b"x" * 129,
        b"x" * 4_000,
        b"%25" * 1_000,
    ],
)
async def test_an_odd_id_is_not_found(start_router, replicas, quoted):
    router = await start_router(replicas[0])
    await complete(router, x_request_id="mine")

    status, told = await get(router, b"/explain/" + quoted)

    assert (status, told["error"]["code"]) == (404, "receipt_not_found")
    assert len(told["error"]["message"]) < 400


async def test_an_id_of_any_characters_is_found_by_its_quoted_form(start_router, replicas):
    router = await start_router(replicas[0])
    _, request_id = await complete(router, x_request_id="a/b?c=%41#'\"<")

    status, told = await get(router, b"/explain/a%2Fb%3Fc%3D%2541%23%27%22%3C")

    assert (status, told["id"]) == (200, request_id)
    shown = await run(request_id, "--admin", admin_url(router))
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(request_id)


async def test_explain_is_only_read(start_router, replicas):
    router = await start_router(replicas[0])
    url = f"{admin_url(router)}/explain/x"
    async with aiohttp.ClientSession() as session:
        async with session.delete(url) as answer:
            assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_the_data_port_explains_nothing(start_router, replicas):
    router = await start_router(replicas[0])
    _, request_id = await complete(router)
    async with aiohttp.ClientSession() as session:
        url = "http://{}:{}/explain/{}".format(*router.address, request_id)
        async with session.get(url) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")


# the command


async def test_the_command_prints_a_table(start_router, replicas):
    router = await start_router(*replicas)
    replicas[0].fault = "text500"
    ids = [(await complete(router, {"prompt": str(n) + PROMPT}))[1] for n in range(6)]
    told = [await explain(router, request_id) for request_id in ids]
    (retried, *_) = [one for one in told if len(one["attempts"]) == 2]

    shown = await run(retried["id"], "--admin", admin_url(router))

    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].split() == [retried["id"], retried["at"], "model", "m"]
    assert lines[1].startswith("ok, status 200, after ")
    assert "prompt 100 tokens, from cache: 0" in lines
    first, second = [n for n, line in enumerate(lines) if line.startswith("attempt ")]
    assert lines[first + 1].split() == [
        "replica",
        "cost",
        "matched",
        "known",
        "by",
        "uncached",
        "queued",
        "decoding",
    ]
    assert lines[first + 2].split()[:2] == ["*", "r0"]
    assert lines[first + 3].split()[0] == "r1"
    assert "  loss: status 500, then retried" in lines[first:second]
    assert lines[second + 2].split()[:2] == ["*", "r1"]
    assert len({len(line) for line in lines[first + 1 : first + 4]}) == 1  # columns stand


async def test_the_command_prints_the_page_as_it_is(start_router, replicas):
    router = await start_router(*replicas)
    _, request_id = await complete(router)

    shown = await run(request_id, "--json", "--admin", admin_url(router))

    told = await explain(router, request_id)
    del told["at"]
    assert told.items() <= json.loads(shown.output).items()


async def test_the_command_asks_worker_after_worker(start_router, replicas):
    served, other = await start_router(*replicas), await start_router(*replicas)
    _, request_id = await complete(served)

    shown = await run(request_id, "--admin", admin_url(other), "--admin", admin_url(served))
    assert shown.output.startswith(request_id)

    missing = await run("unknown", "--admin", admin_url(other), "--admin", admin_url(served))
    assert missing.exit_code == 1
    assert "no receipt of that request id" in missing.output


async def test_the_command_says_that_a_key_is_needed(start_router, replicas, tmp_path):
    key, line = make_key(b"k" * 32)
    (tmp_path / "keys").write_text(f"{line} operator\n")
    (tmp_path / "key").write_text(f"{key}\n")
    router = await start_router(*replicas, admin_keys_file=tmp_path / "keys")
    _, request_id = await complete(router)
    asking = (request_id, "--admin", admin_url(router))

    without = await run(*asking)
    assert without.exit_code == 1
    assert "--admin-key-file" in without.output
    assert (await run(*asking, "--admin-key-file", str(tmp_path / "key"))).exit_code == 0


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff"])
def test_a_file_that_holds_no_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)

    shown = CliRunner().invoke(main, ["explain", "x", "--admin-key-file", str(tmp_path / "key")])

    assert shown.exit_code == 1
    assert "key" in shown.output


def test_the_command_says_where_no_router_answers():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        shown = CliRunner().invoke(main, ["explain", "x", "--admin", url])

    assert shown.exit_code == 1
    assert f"no router answers at {url}" in shown.output


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9000", "https://a", "http://", "http://a:b", "http://a/v1", "http://a?b"]
)
def test_a_url_that_is_no_admin_port_is_refused(url):
    shown = CliRunner().invoke(main, ["explain", "x", "--admin", url])

    assert shown.exit_code == 2
    assert "looks like http://127.0.0.1:9000" in shown.output


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>", "not a router of this version"),
        (200, b'{"id":1}', "not a router of this version"),
        (404, b"\xff", "this is not a router's admin port"),
        (500, b'{"error":"\x1b[2J"}', "answered 500: this is not a router's admin port"),
    ],
)
async def test_whatever_else_answers_breaks_nothing(status, body, said):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % (status, len(body)) + body)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        shown = await run("x", "--admin", f"http://{host}:{port}")

    assert shown.exit_code == 1
    assert said in shown.output
    assert "\x1b" not in shown.output


async def test_what_clients_chose_does_not_reach_the_terminal_raw(start_router, replicas):
    router = await start_router(replicas[0])
    _, request_id = await complete(router, {"model": "m\x1b[2J\n"})

    shown = await run(request_id, "--admin", admin_url(router))

    assert "\x1b" not in shown.output
    assert "model m?[2J?" in shown.output
