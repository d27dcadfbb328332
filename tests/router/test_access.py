"""Who may come in: what is refused at the start, and the keys of both ports."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from random import Random

import aiohttp
import pytest

from roost_router.access import Access
from roost_router.app import Router, build_placer
from roost_router.config import ConfigError, RouterConfig
from roost_router.keys import make_key

URL = "http://127.0.0.1:8101"


def key_file(path: Path, *names: str) -> tuple[Path, list[str]]:
    made = [make_key(bytes([number]) * 32) for number in range(len(names))]
    path.write_text(
        "".join(f"{line} {name}\n" for (_, line), name in zip(made, names, strict=True))
    )
    return path, [key for key, _ in made]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
@pytest.mark.parametrize("option", ["host", "admin_host"])
def test_this_machine_comes_in_without_a_key(host, option):
    RouterConfig(replicas=(URL,), **{option: host})


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "fd00::1", "", "myhost", "localhost."]
)
@pytest.mark.parametrize("option", ["host", "admin_host"])
def test_other_machines_do_not_unless_keys_are_asked_for_or_it_is_said(tmp_path, host, option):
    keys = {"host": "api_keys_file", "admin_host": "admin_keys_file"}
    with pytest.raises(ConfigError, match=r"without a key.*--insecure"):
        RouterConfig(replicas=(URL,), **{option: host})

    RouterConfig(replicas=(URL,), insecure=True, **{option: host})
    RouterConfig(replicas=(URL,), **{option: host, keys.pop(option): tmp_path})
    with pytest.raises(ConfigError):  # the other port's keys do not help
        RouterConfig(replicas=(URL,), **{option: host, keys.popitem()[1]: tmp_path})


@pytest.mark.parametrize("option", ["api_keys_file", "admin_keys_file", "replica_key_file"])
@pytest.mark.parametrize("content", [None, b"", b"sk-canary", b"\xff\xfe", b"two words\n"])
def test_a_file_that_cannot_be_used_stops_the_start_and_is_not_shown(tmp_path, option, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    config = RouterConfig(replicas=(URL,), **{option: path})
    if option == "replica_key_file" and content == b"sk-canary":
        assert Access(config).replica_authorization() == "Bearer sk-canary"
        return

    with pytest.raises(ConfigError, match="keys") as raised:
        Access(config)

    assert "canary" not in str(raised.value)


def test_keys_are_read_again_all_or_nothing(tmp_path, caplog):
    path, (old,) = key_file(tmp_path / "keys", "old")
    access = Access(RouterConfig(replicas=(URL,), api_keys_file=path))
    path.write_text("sk-canary is no hash\n")
    access.reload()
    assert access.api_keys.owner(f"Bearer {old}".encode()) == "old"
    assert "keys stay as they were" in caplog.text
    assert "canary" not in caplog.text

    path.write_text(make_key(b"n" * 32)[1])
    access.reload()

    assert access.api_keys.owner(f"Bearer {old}".encode()) is None
    assert access.api_keys.owner(b"Bearer " + make_key(b"n" * 32)[0].encode())


async def ask(router, path: str, key: str | None = None, method: str = "GET"):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    url = "http://{}:{}{}".format(*router.admin_address, path)
    async with aiohttp.ClientSession() as session:
        async with session.request(method, url, headers=headers) as answer:
            return answer.status, await answer.read(), answer.headers


async def test_admin_pages_ask_for_an_admin_key_and_probes_do_not(start_router, replicas, tmp_path):
    path, (key,) = key_file(tmp_path / "keys", "operator")
    router = await start_router(*replicas, admin_keys_file=path)

    for page in ("/metrics", "/fleet", "/nothing"):
        for wrong in (None, "sk-wrong", ""):
            status, body, headers = await ask(router, page, wrong)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
    for page in ("/health", "/ready"):
        assert (await ask(router, page))[0] == 200
    for page in ("/metrics", "/fleet"):
        assert (await ask(router, page, key))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/workers", 404, "not_found"),
        ("POST", "/ready", 405, "method_not_allowed"),
        ("DELETE", "/fleet", 405, "method_not_allowed"),
        ("GET", "/v1/models", 404, "not_found"),
    ],
)
async def test_errors_of_the_admin_port_are_openai_shaped(
    start_router, replicas, method, path, status, code
):
    router = await start_router(*replicas)

    found, body, headers = await ask(router, path, method=method)

    assert (found, headers["content-type"]) == (status, "application/json")
    assert json.loads(body)["error"]["code"] == code


async def test_the_poller_shows_replicas_the_key_they_ask_for(start_router, replicas, tmp_path):
    (tmp_path / "key").write_text("sk-replica\n")
    seen = []
    models = replicas[0]._models

    async def spy(request):
        seen.append(request.headers.get("authorization"))
        return await models(request)

    await replicas[0].stop()
    replicas[0]._models = spy
    await replicas[0].start()
    await start_router(replicas[0], replica_key_file=tmp_path / "key")

    assert set(seen) == {"Bearer sk-replica"}


async def complete(router, authorization: str | None) -> tuple[int, bytes]:
    headers = {} if authorization is None else {"authorization": authorization}
    body = {"model": "m", "prompt": "x"}
    url = "http://{}:{}/v1/completions".format(*router.address)
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.post(url, json=body) as answer:
            return answer.status, await answer.read()


async def test_completions_and_models_need_a_key(start_router, replicas, tmp_path):
    path, (key, other) = key_file(tmp_path / "keys", "alice", "bob")
    router = await start_router(*replicas, api_keys_file=path)

    for wrong in (None, "", "Bearer", f"Basic {key}", f"Bearer {key}x", f"Bearer {key[:-1]}", key):
        status, body = await complete(router, wrong)
        assert status == 401
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert key[:-1] not in body.decode()
    assert replicas[0].bodies + replicas[1].bodies == []
    for right in (key, other):
        for _ in range(4):  # the router recognises heads that repeat
            assert (await complete(router, f"Bearer {right}"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/v1/nothing", "/"])
async def test_every_path_asks_for_a_key(start_router, replicas, tmp_path, path):
    """Who has no key learns nothing, not even which paths there are."""
    keys, (key,) = key_file(tmp_path / "keys", "alice")
    router = await start_router(*replicas, api_keys_file=keys)
    url = "http://{}:{}{}".format(*router.address, path)

    async with aiohttp.ClientSession() as session:
        async with session.get(url) as answer:
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        async with session.get(url, headers={"authorization": f"Bearer {key}"}) as answer:
            assert answer.status == (200 if "models" in path else 404)


@pytest.mark.parametrize(
    ("has_keys", "has_replica_key", "sees"),
    [
        (False, False, "client"),
        (True, False, None),
        (False, True, "Bearer sk-replica"),
        (True, True, "Bearer sk-replica"),
    ],
)
async def test_what_replicas_see_of_keys(
    start_router, replicas, tmp_path, has_keys, has_replica_key, sees
):
    keys, (key,) = key_file(tmp_path / "keys", "alice")
    (tmp_path / "key").write_text("sk-replica\n")
    files = {"api_keys_file": keys} if has_keys else {}
    files |= {"replica_key_file": tmp_path / "key"} if has_replica_key else {}
    router = await start_router(*replicas, **files)

    for _ in range(4):
        assert (await complete(router, f"Bearer {key}"))[0] == 200

    seen = {headers.get("authorization") for r in replicas for headers in r.headers}
    assert seen == {f"Bearer {key}" if sees == "client" else sees}


async def test_keys_read_again_hold_for_connections_that_are_open(start_router, replicas, tmp_path):
    path, (key,) = key_file(tmp_path / "keys", "alice")
    router = await start_router(*replicas, api_keys_file=path)
    url = "http://{}:{}/v1/models".format(*router.address)
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}) as session:
        for _ in range(4):
            async with session.get(url) as answer:
                assert answer.status == 200
        path.write_text(make_key(b"n" * 32)[1])
        router.service.access.reload()

        async with session.get(url) as answer:
            assert answer.status == 401


@pytest.mark.parametrize("option", ["listen_fd", "admin_listen_fd"])
async def test_a_socket_that_was_opened_for_us_is_judged_too(option):
    """systemd's, or a supervisor's: the address that counts is the socket's."""
    with socket.create_server(("0.0.0.0", 0)) as opened:
        options = {"port": 0, "admin_port": 0, option: os.dup(opened.fileno())}
        config = RouterConfig(replicas=(URL,), **options)

        with pytest.raises(ConfigError, match="without a key"):
            await Router(config, build_placer(config, Random(1))).start()
