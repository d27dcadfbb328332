"""A real browser, driven over the Chrome DevTools Protocol; whoever has none skips."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MISSING = f"no browser here: none of {', '.join(NAMES)} is on the path"
_OPTIONS = (
    *("--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-dev-shm-usage", "--remote-debugging-port=0"),
)


def find_browser() -> str | None:
    """Path of the first browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One tab, and what it complained of and asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []  # exceptions, console errors, refusals of the policy
        self.urls: list[str] = []  # of all requests
        self.session = ""
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        await self._socket.send_json(message)
        async with asyncio.timeout(20):
            return await answer

    async def read(self) -> None:
        """Take in what the browser says, until it is gone."""
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                answer = self._answers.pop(told["id"])
                if "error" in told:
                    answer.set_exception(RuntimeError(str(told["error"])))
                else:
                    answer.set_result(told["result"])
            else:
                self._note(told["method"], told["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in {"warning", "error"}:
            self.complaints.append(str(params["entry"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning"}:
            self.complaints.append(str(params["args"]))

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(20):
            while not await self.run(f"Boolean({script})"):
                await asyncio.sleep(0.05)

    async def screenshot(self, file: Path) -> None:
        """A picture of what is to be seen."""
        shot = await self.send("Page.captureScreenshot", format="png")
        await asyncio.to_thread(file.write_bytes, base64.b64decode(shot["data"]))


@asynccontextmanager
async def open_tab(browser: str, profile: Path, width: int = 1400) -> AsyncIterator[Tab]:
    """Start the browser at `browser` with an empty profile in `profile`, and open a tab."""
    options = [*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},1000"]
    if os.geteuid() == 0:  # its sandbox refuses to work for root
        options.append("--no-sandbox")
    process = await asyncio.create_subprocess_exec(
        browser,
        *options,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(60):
            address = await _address(process)
        async with aiohttp.ClientSession() as http:
            async with http.ws_connect(address, max_msg_size=1 << 26) as socket:
                tab = Tab(socket)
                reading = asyncio.create_task(tab.read())
                target = await tab.send("Target.createTarget", url="about:blank")
                attached = await tab.send("Target.attachToTarget", flatten=True, **target)
                tab.session = attached["sessionId"]
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.send(f"{domain}.enable")
                yield tab
                reading.cancel()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its helpers too
        await process.communicate()


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        if found := re.search(rb"listening on (ws://\S+)", line):
            return found[1].decode()
    raise AssertionError("the browser ended at once")
