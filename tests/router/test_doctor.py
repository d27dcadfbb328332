"""`roost doctor` against real routers: the ladder with losses and cures, findings, exit status."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp import web
from asking import admin_url, complete
from click.testing import CliRunner

from roost.cli import main
from roost_router.keys import make_key


async def doctor(*arguments: str):
    return await asyncio.to_thread(CliRunner().invoke, main, ["doctor", *arguments])


async def test_before_the_first_request_there_is_no_ladder(start_router, replicas):
    router = await start_router(*replicas)

    found = await doctor("--admin", admin_url(router))

    assert found.exit_code == 0, found.output
    assert "2 of 2 replicas up" in found.output
    assert "there is no hit ladder" in found.output
    assert "No findings on replicas" in found.output


async def test_each_rung_is_told_with_what_it_lost_and_the_cure(start_router, replicas):
    router = await start_router(replicas[0])
    replicas[0].prompt_tokens, replicas[0].cached_tokens = 800, 0
    for _ in range(4):
        await complete(router)

    found = await doctor("--admin", admin_url(router))

    lines = [line.split() for line in found.output.splitlines()]
    shares = {words[0]: words[1] for words in lines if len(words) == 3 and words[2] == "%"}
    assert list(shares) == ["ideal", "capacity-bound", "known", "routed", "delivered"]
    assert shares["delivered"] == "0.0"
    assert float(shares["ideal"]) == pytest.approx(75, abs=5)
    assert "m, last 10 minutes: 4 requests, 3,200 prompt tokens" in found.output
    assert "prompts that nobody sent before" in found.output
    assert "did not have what it was believed" in found.output
    assert "--enable-prefix-caching" in found.output
    assert "more replicas" not in found.output  # nothing was lost there


async def test_silence_about_the_cache_is_told(start_router, replicas):
    router = await start_router(replicas[0])
    replicas[0].prompt_tokens, replicas[0].cached_tokens = 800, None
    for _ in range(10):
        await complete(router)

    found = await doctor("--admin", admin_url(router))

    assert found.exit_code == 0
    assert "no replica reported cached_tokens" in found.output
    assert "warning  r0: does not report cached_tokens" in found.output
    assert "prompt_tokens_details.cached_tokens" in found.output


async def test_an_error_is_an_exit_status_and_each_router_is_looked_at(start_router, replicas):
    router, other = await start_router(*replicas), await start_router(replicas[0])
    await replicas[1].stop()
    while router.placer.fleet.replicas[1].is_up:
        await asyncio.sleep(0.01)

    found = await doctor("--admin", admin_url(other), "--admin", admin_url(router))

    assert found.exit_code == 1
    assert found.output.count("roost 0") == 2
    assert "error    r1: does not answer any more" in found.output


async def test_keys_and_mistaken_addresses_are_explained(start_router, replicas, tmp_path):
    key, stored = make_key(b"k" * 32)
    (tmp_path / "keys").write_text(stored + "\n")
    (tmp_path / "key").write_text(key + "\n")
    router = await start_router(*replicas, admin_keys_file=tmp_path / "keys")
    url = admin_url(router)

    refused = await doctor("--admin", url)
    shown = await doctor("--admin", url, "--admin-key-file", str(tmp_path / "key"))
    data_port = await doctor("--admin", "http://{}:{}".format(*router.address))

    assert (refused.exit_code, shown.exit_code, data_port.exit_code) == (1, 0, 1)
    assert "give it with --admin-key-file" in refused.output
    assert "answered 404" in data_port.output


async def test_where_nobody_listens_the_cure_is_told():
    with socket.create_server(("127.0.0.1", 0)) as held:
        url = f"http://127.0.0.1:{held.getsockname()[1]}"

    found = await doctor("--admin", url)

    assert found.exit_code == 1
    assert "--admin takes the URL of its admin port" in found.output


async def test_what_moves_a_cursor_is_not_printed_and_other_pages_are_refused(start_router):
    """What answers at the address may be anything."""
    pages = [b'{"version": "\x1b[2J"}', b"[]", b"<html>", b'{"error": {"message": "\x1b[2J"}}']

    async def fleet(_: web.Request) -> web.Response:
        return web.Response(body=pages[0], status=500 if b"error" in pages[0] else 200)

    app = web.Application()
    app.router.add_get("/fleet", fleet)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    while pages:
        found = await doctor("--admin", url)
        assert found.exit_code == 1
        assert "\x1b" not in found.output
        assert "Traceback" not in found.output
        pages.pop(0)
    await runner.cleanup()
