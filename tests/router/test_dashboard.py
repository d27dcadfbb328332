"""The dashboard's files as a browser gets them, and the page in a real browser."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from asking import admin_url, complete, get
from browser import MISSING, Tab, find_browser, open_tab

from roost_router import dashboard
from roost_router.keys import make_key
from roost_router.policy.round_robin import RoundRobin
from roost_router.policy.shadow import Shadow

FOLDER = Path(dashboard.__file__).parent
FILES = sorted(file.name for file in FOLDER.iterdir() if file.suffix in {".js", ".css", ".svg"})
BROWSER = find_browser()
in_browser = pytest.mark.skipif(BROWSER is None, reason=MISSING)


async def test_every_file_is_served_with_its_type_and_a_strict_policy(start_router, replicas):
    router = await start_router(*replicas)
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

    for path, name in [("/", "index.html"), *((f"/dashboard/{name}", name) for name in FILES)]:
        status, body, headers = await get(router, path)

        assert (status, body) == (200, (FOLDER / name).read_bytes())
        kind = types.get(Path(name).suffix, "text/html")
        assert headers["content-type"].partition(";")[0] == kind
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"


async def test_nothing_else_in_the_folder_is_served(start_router, replicas):
    router = await start_router(*replicas)

    for path in ("/dashboard/files.py", "/dashboard/", "/dashboard", "/dashboard/../files.py"):
        assert (await get(router, path))[0] == 404


def test_the_page_loads_nothing_from_elsewhere():
    for file in FOLDER.iterdir():
        if file.is_file():
            named = re.findall(r"https?://[^\s\"'<>]+", file.read_text())
            assert set(named) <= {"http://www.w3.org/2000/svg"}, file.name


async def test_the_files_are_open_and_what_they_show_is_not(start_router, replicas, tmp_path):
    key, stored = make_key(b"k" * 32)
    (tmp_path / "keys").write_text(stored + "\n")
    router = await start_router(*replicas, admin_keys_file=tmp_path / "keys")

    assert (await get(router, "/"))[0] == 200
    assert (await get(router, "/dashboard/main.js"))[0] == 200
    assert (await get(router, "/fleet"))[0] == 401
    assert (await get(router, "/fleet", key))[0] == 200


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    """A tab of a browser that was just started."""
    assert BROWSER is not None
    async with open_tab(BROWSER, tmp_path / "profile") as opened:
        yield opened


def text_of(selector: str) -> str:
    return f"(document.querySelector({selector!r})?.innerText ?? '')"


@in_browser
@pytest.mark.e2e
async def test_the_fleet_is_seen_and_followed(start_router, replicas, tab, tmp_path):
    router = await start_router(*replicas)
    router.service.metrics.shadow = Shadow("round-robin", RoundRobin, Random(1))
    replicas[1].model = "<img src=x onerror=alert(1)>"  # markup in a name stays text
    while router.placer.fleet.replicas[1].models != (replicas[1].model,):
        await complete(router)

    await tab.send("Page.navigate", url=admin_url(router) + "/")
    await tab.until("document.querySelectorAll('#replicas tbody tr').length === 2")
    await tab.until(f"{text_of('#about')}.includes('2 of 2 replicas up')")
    assert "live" in await tab.run(text_of("#status"))
    assert "onerror" in await tab.run(text_of("#replicas"))
    assert await tab.run("document.querySelectorAll('#fleet img').length") == 0
    ladder = await tab.run(text_of("#ladders"))
    assert "Where cache hits go: m" in ladder
    assert "delivered" in ladder
    assert "Shadow policy: round-robin" in await tab.run(text_of("#shadow"))

    await replicas[1].stop()  # the page learns of it without being loaded again
    await tab.until(f"{text_of('#findings')}.includes('does not answer any more')")
    await tab.until(f"{text_of('#replicas')}.includes('down')")
    await tab.screenshot(tmp_path / "fleet.png")

    assert tab.complaints == []
    assert {url.startswith(admin_url(router)) for url in tab.urls} == {True}


@in_browser
@pytest.mark.e2e
async def test_colours_follow_the_system_and_can_be_read(start_router, replicas, tab):
    """Text against what it stands on: at least 4.5 to 1 (WCAG 2, AA), in both schemes."""
    router = await start_router(*replicas)
    await replicas[1].stop()
    await tab.send("Page.navigate", url=admin_url(router) + "/")
    await tab.until("document.querySelector('#findings .bad, #replicas .bad')")

    grounds = set()
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await tab.send("Emulation.setEmulatedMedia", features=features)
        grounds.add(await tab.run("getComputedStyle(document.body).backgroundColor"))
        for selector in (
            "h1",
            "#about",
            ".tile h2",
            ".tile p",
            "td",
            "th",
            ".good",
            ".bad",
            ".cure",
            "#status",
        ):
            assert await tab.run(CONTRAST % selector) >= 4.5, (scheme, selector)

    assert len(grounds) == 2


CONTRAST = """(() => {
  const channels = (color) => color.match(/[0-9.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = channels(color).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const shown = document.querySelector(%r);
  let ground = shown;
  while (channels(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const pair = [getComputedStyle(shown).color, getComputedStyle(ground).backgroundColor];
  const [low, high] = pair.map(light).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
})()"""


@in_browser
@pytest.mark.e2e
async def test_the_page_asks_for_a_key_and_keeps_it_in_its_tab(
    start_router, replicas, tab, tmp_path
):
    key, stored = make_key(b"k" * 32)
    (tmp_path / "keys").write_text(stored + "\n")
    router = await start_router(*replicas, admin_keys_file=tmp_path / "keys")

    async def enter(text: str) -> None:
        await tab.run(f"document.querySelector('#key').value = {text!r}")
        await tab.run("document.querySelector('#ask button').click()")

    await tab.send("Page.navigate", url=admin_url(router) + "/")
    await tab.until("document.querySelector('#ask') && !document.querySelector('#ask').hidden")
    assert await tab.run("document.querySelector('#fleet').hidden")

    await enter("sk-wrong")
    await tab.until(f"{text_of('#refused')}.includes('refused')")
    await enter(key)
    await tab.until("document.querySelectorAll('#replicas tbody tr').length === 2")
    assert await tab.run("document.querySelector('#ask').hidden")
    assert key in await tab.run("Object.values(sessionStorage).join()")
    assert await tab.run("localStorage.length") == 0
    assert await tab.run("document.cookie") == ""

    await tab.send("Page.reload")
    await tab.until("document.querySelectorAll('#replicas tbody tr').length === 2")

    await tab.run("document.querySelector('#forget').click()")
    await tab.until("!document.querySelector('#ask').hidden")
    assert await tab.run("sessionStorage.length") == 0
    assert {url.startswith(admin_url(router)) for url in tab.urls} == {True}
    assert not any(key in url for url in tab.urls)


@in_browser
@pytest.mark.e2e
async def test_a_router_that_goes_away_is_shown_as_gone_and_comes_back(start_router, replicas, tab):
    router = await start_router(*replicas)
    port = router.admin_address[1]
    await tab.send("Page.navigate", url=admin_url(router) + "/")
    await tab.until("document.querySelectorAll('#replicas tbody tr').length === 2")

    await router.stop()
    await tab.until(f"{text_of('#status')}.includes('no answer since')")
    assert await tab.run("document.body.classList.contains('stale')")
    assert await tab.run("document.querySelectorAll('#replicas tbody tr').length") == 2

    await start_router(replicas[0], admin_port=port)
    await tab.until(f"{text_of('#status')}.includes('live')")
    assert not await tab.run("document.body.classList.contains('stale')")
    assert await tab.run("document.querySelectorAll('#replicas tbody tr').length") == 1
