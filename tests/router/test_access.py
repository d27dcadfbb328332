"""Who may come in: what is refused at the start, and the keys of both ports."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest

from roost_router.access import Access
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

    for page in ("/metrics", "/replicas", "/nothing"):
        for wrong in (None, "sk-wrong", ""):
            status, body, headers = await ask(router, page, wrong)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
    for page in ("/health", "/ready"):
        assert (await ask(router, page))[0] == 200
    for page in ("/metrics", "/replicas"):
        assert (await ask(router, page, key))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/workers", 404, "not_found"),
        ("POST", "/ready", 405, "method_not_allowed"),
        ("DELETE", "/replicas", 405, "method_not_allowed"),
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
