"""POST /explain and `roost explain --dry-run`: where a request would go, without its going."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from click.testing import CliRunner

from roost.cli import main
from roost_router.errors import BadRequestError
from roost_router.openai_request import CHAT_PATH, COMPLETIONS_PATH, EMBEDDINGS_PATH, guess_path

PROMPT = "a prompt that is told again and again. " * 100
BODY = {"model": "m", "prompt": PROMPT}


def admin_url(router) -> str:
    return "http://{}:{}".format(*router.admin_address)


async def post(url: str, body: object) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(url, data=data) as answer:
        return answer.status, await answer.json()


async def test_it_says_where_a_request_would_go_and_goes_nowhere(start_router, replicas):
    router = await start_router(*replicas)
    placer, url = router.placer, f"{admin_url(router)}/explain"
    status, before = await post(url, BODY)
    assert status == 200, before
    assert before["model"] == "m"
    assert before["prompt_bytes"] == len("text\x1fm\x1f\x1f" + PROMPT)
    assert [row["matched_tokens"] for row in before["candidates"]] == [0, 0]
    assert len(placer.index) == 0
    assert [replica.num_in_flight for replica in placer.fleet.replicas] == [0, 0]
    assert len(router.service.receipts) == 0

    data_url = "http://{}:{}/v1/completions".format(*router.address)
    async with aiohttp.ClientSession() as session, session.post(data_url, json=BODY) as answer:
        home = answer.headers["x-roost-replica"]
    _, after = await post(url, BODY)

    assert after["replica"] == home
    rows = {row["replica"]: row for row in after["candidates"]}
    assert rows[home]["matched_tokens"] > rows[home]["uncached_tokens"]
    in_rows = {row["matched_tokens"] + row["uncached_tokens"] for row in rows.values()}
    assert in_rows == {after["prompt_tokens"]}
    assert after["runner_up"]["replica"] != home
    assert after["runner_up"]["behind_s"] > 0
    assert not any(row["is_told"] for row in rows.values())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[" * 5000, 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        ({"prompt": "no model"}, 400, "invalid_request"),
        ({"model": "nobody's", "prompt": "x"}, 404, "model_not_found"),
    ],
)
async def test_what_would_be_refused_is_refused(start_router, replicas, body, status, code):
    router = await start_router(replicas[0])

    got, told = await post(f"{admin_url(router)}/explain", body)

    assert (got, told["error"]["code"]) == (status, code)


async def test_it_is_asked_by_post_only(start_router, replicas):
    router = await start_router(replicas[0])
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{admin_url(router)}/explain") as answer:
            assert answer.status == 405
            assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, CHAT_PATH),
        ({"messages": []}, CHAT_PATH),
        ({"prompt": "x"}, COMPLETIONS_PATH),
        ({"input": "x"}, EMBEDDINGS_PATH),
        ({}, COMPLETIONS_PATH),
    ],
)
def test_the_fields_of_a_body_tell_its_path(fields, path):
    assert guess_path(json.dumps({"model": "m", **fields}).encode()) == path


def test_a_body_that_is_no_object_is_refused():
    with pytest.raises(BadRequestError, match="not valid JSON"):
        guess_path(b"[1]")


async def test_the_command_prints_a_table(start_router, replicas, tmp_path):
    router = await start_router(*replicas)
    body = tmp_path / "body.json"
    body.write_text(json.dumps(BODY))

    def run(*arguments: str, text: str | None = None):
        arguments = ("explain", *arguments, "--admin", admin_url(router))
        return CliRunner().invoke(main, arguments, input=text)

    shown = await asyncio.to_thread(run, "--dry-run", str(body))
    piped = await asyncio.to_thread(run, "--dry-run", "-", "--json", text=body.read_text())
    both = await asyncio.to_thread(run, "some-id", "--dry-run", str(body))
    neither = await asyncio.to_thread(run)

    assert shown.exit_code == 0, shown.output
    assert "it would go to r" in shown.output
    assert "known by" in shown.output
    assert json.loads(piped.output)["model"] == "m"
    assert both.exit_code == neither.exit_code == 2
