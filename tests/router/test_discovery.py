"""Files and names as sources, and a router that finds its replicas by them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from asking import complete, fleet, get, until

from roost_router.config import ConfigError, RouterConfig
from roost_router.discovery import dns, follow
from roost_router.discovery.dns import DnsSource
from roost_router.discovery.file import FileSource
from roost_router.discovery.follow import Discovery
from roost_router.discovery.roster import Told
from roost_router.discovery.source import Failed
from roost_router.fleet.fleet import Fleet
from roost_router.fleet.replica import Membership
from roost_router.index.prefix_index import PrefixIndex

A, B, C = (f"http://10.0.0.{number}:8000" for number in (1, 2, 3))
LOOK_S = 0.03


class Heard:
    """All that a source answers."""

    def __init__(self) -> None:
        self.answers: list[list[str] | str] = []

    async def listen(self, source) -> None:
        async for answer in source.answers():
            if isinstance(answer, Failed):
                self.answers.append(answer.reason)
            else:
                self.answers.append([told.url for told in answer])


@asynccontextmanager
async def hearing(source):
    heard = Heard()
    task = asyncio.create_task(heard.listen(source))
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def replace(path: Path, text: str) -> None:
    """As editors and ConfigMaps do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


# files


async def test_a_file_is_read_again_when_it_is_replaced_and_only_then(tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text(f"{A}\n")
    async with hearing(FileSource(path, LOOK_S)) as heard:
        await until(lambda: heard.answers == [[A]])
        await asyncio.sleep(5 * LOOK_S)
        assert heard.answers == [[A]]

        replace(path, f"{A}\n{B}\n")

        await until(lambda: heard.answers == [[A], [A, B]])


async def test_a_file_that_is_being_written_is_read_when_it_is_done(tmp_path):
    """http://10.0.0.1:80 would be a URL, too."""
    path = tmp_path / "replicas.txt"
    path.write_text(f"{A}\n")
    async with hearing(FileSource(path, LOOK_S)) as heard:
        await until(lambda: heard.answers == [[A]])
        with path.open("w") as file:
            for letter in f"{B}\n{C}\n":
                file.write(letter)
                file.flush()
                await asyncio.sleep(LOOK_S / 3)

        await until(lambda: heard.answers[-1] == [B, C])

    assert heard.answers == [[A], [B, C]]


async def test_a_bad_file_says_where_and_a_good_one_after_it_counts(tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text(f"{A}\n")
    async with hearing(FileSource(path, LOOK_S)) as heard:
        await until(lambda: len(heard.answers) == 1)
        replace(path, f"{A}\n   nonsense\n")
        await until(lambda: len(heard.answers) == 2)
        path.unlink()
        await until(lambda: len(heard.answers) == 3)
        path.write_text(f"{B}\n")
        await until(lambda: len(heard.answers) == 4)

    assert heard.answers[1].startswith(f"{path}: line 2, column 4: 'nonsense' is not a replica's")
    assert heard.answers[2] == f"cannot read {path}: No such file or directory"
    assert heard.answers[3] == [B]


async def test_a_pipe_is_no_file_of_replicas(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    async with hearing(FileSource(path, LOOK_S)) as heard:
        await until(lambda: heard.answers == [f"{path} is no file"])


async def test_hurry_reads_it_though_nothing_seems_to_have_changed(tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text(f"{A}\n")
    source = FileSource(path, look_s=60.0)
    async with hearing(source) as heard:
        await until(lambda: heard.answers == [[A]])
        path.write_text(f"{B}\n")

        source.hurry()

        await until(lambda: heard.answers == [[A], [B]])


# names


def found(*addresses: str) -> list:
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 80, 0, 0))
        if ":" in address
        else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        for address in addresses
    ]


async def answered(answer, url: str = "http://vllm.models:8000") -> list[str] | str:
    """What the source makes of an answer of the resolver."""

    async def resolve(host: str, port: int):
        assert (host, port) == ("vllm.models", 8000)
        if isinstance(answer, Exception):
            raise answer
        return answer

    answers = DnsSource(url, resolve=resolve).answers()
    told = await anext(answers)
    await answers.aclose()
    return told.reason if isinstance(told, Failed) else [one.url for one in told]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (found("10.0.0.2", "10.0.0.1", "10.0.0.1"), [A, B]),
        (found("fd00::1", "10.0.0.1", "fd00::2"), [A]),
        (found("fd00::2", "fd00::1"), ["http://[fd00::1]:8000", "http://[fd00::2]:8000"]),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), []),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "Temporary failure"),
        (UnicodeError("label too long"), "label too long"),
        (OSError("no more files"), "no more files"),
    ],
)
async def test_a_name_is_as_many_replicas_as_it_has_addresses(answer, expected):
    assert await answered(answer) == expected


async def test_a_path_is_every_replicas():
    assert await answered(found("10.0.0.1"), "http://vllm.models:8000/m") == [f"{A}/m"]


async def test_a_resolver_that_hangs_is_told_and_waited_for(monkeypatch):
    monkeypatch.setattr(dns, "_SLOW_S", 0.02)
    gate = asyncio.Event()

    async def resolve(_host: str, _port: int):
        await gate.wait()
        return found("10.0.0.1")

    async with hearing(DnsSource("http://vllm:8000", 0.01, resolve)) as heard:
        await until(lambda: heard.answers == ["the resolver does not answer"])
        gate.set()
        await until(lambda: [A] in heard.answers)


async def test_the_systems_resolver_knows_this_machine():
    answers = DnsSource("http://localhost:8000").answers()
    assert [told.url for told in await anext(answers)] == ["http://127.0.0.1:8000"]
    await answers.aclose()


# the fleet


class Breaking:
    """A source with a defect."""

    name, linger_s = "broken", 0.0

    def __init__(self) -> None:
        self.num_begun = 0

    def hurry(self) -> None:
        pass

    async def answers(self):
        self.num_begun += 1
        yield [Told(B)]
        raise RuntimeError("a defect")


async def test_a_source_with_a_defect_is_begun_anew_and_harms_no_other(monkeypatch, caplog):
    monkeypatch.setattr(follow, "_ANEW_S", 0.01)
    members, broken = Fleet(PrefixIndex(), [A]), Breaking()
    discovery = Discovery(members, [broken], time.monotonic)
    task = asyncio.create_task(discovery.run())
    await until(lambda: broken.num_begun >= 3)

    assert [replica.url for replica in members.replicas] == [A, B]
    assert "a defect" in caplog.text
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_others_tell_joins_and_drains_like_what_sources_do():
    """How a store's registrations come in."""
    members = Fleet(PrefixIndex(), [])
    discovery = Discovery(members, [], lambda: 0.0)
    discovery.open("registered")

    discovery.told("registered", [Told(A), Told(B, is_draining=True)])
    discovery.failed("registered", "no store")

    first, second = members.replicas
    assert (first.url, first.membership) == (A, Membership.MEMBER)
    assert (second.url, second.membership) == (B, Membership.DRAINING)
    [status] = discovery.status()
    assert (status.num_told, status.reason) == (2, "no store")


async def test_a_start_waits_for_no_source_for_long(monkeypatch):
    class Silent(Breaking):
        async def answers(self):
            await asyncio.Event().wait()
            yield []

    monkeypatch.setattr(follow, "START_S", 0.05)
    discovery = Discovery(Fleet(PrefixIndex(), []), [Silent()], time.monotonic)
    task = asyncio.create_task(discovery.run())

    await asyncio.wait_for(discovery.until_told(), 5.0)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_router_finds_its_replicas_in_a_file(start_router, replicas, tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text("# nobody yet\n")
    router = await start_router(replicas_file=path)
    assert (await get(router, "/ready"))[0] == 503
    assert (await get(router, "/health"))[0] == 200
    assert await complete(router) == 503

    replace(path, f"{replicas[0].url}\n")
    router.reload()
    await until(lambda: router.placer.fleet.is_ready)
    assert await complete(router) == 200
    replace(path, f"{replicas[1].url}\n{replicas[0].url}\n")
    router.reload()
    await until(lambda: len(router.placer.fleet.models()["m"]) == 2)
    replace(path, f"{replicas[1].url}\n")
    router.reload()
    await until(lambda: len(router.placer.fleet.replicas) == 1)

    num_before = len(replicas[1].bodies)
    assert [await complete(router) for _ in range(3)] == [200] * 3
    assert len(replicas[1].bodies) == num_before + 3


async def test_a_failing_source_is_a_finding(start_router, replicas, tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text(f"{replicas[0].url}\n")
    router = await start_router(replicas_file=path)

    path.write_text("nonsense\n")
    router.reload()
    await until(lambda: router.discovery.status()[0].failing_since is not None)

    page = await fleet(router)
    [source] = page.sources
    assert source.failing_s is not None
    assert "line 1, column 1" in source.reason
    [finding] = [one for one in page.findings if one.what.startswith("file ")]
    assert finding.severity == "warning"
    assert await complete(router) == 200


async def test_a_given_replica_that_a_source_tells_as_well_is_one(start_router, replicas, tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text("".join(f"{fake.url}/\n" for fake in replicas))
    router = await start_router(replicas[0], replicas_file=path)

    assert [r.url for r in router.placer.fleet.replicas] == [
        replicas[0].url,
        replicas[1].url + "/",
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "no replica given: pass its URL, or where replicas are found: --replicas-file"),
        ({"replicas": ("http://h:1", "http://H.:1/")}, "a replica is given twice"),
        ({"replicas_dns": ("https://vllm:8000",)}, "give it as http://name:port"),
        ({"replicas_dns": ("http://vllm",)}, "give it as http://name:port"),
        ({"replicas_dns": ("http://metadata:80",)}, "a cloud's metadata service"),
        ({"replicas_dns": ("http://v:1", "http://v:1")}, "--replicas-dns names one source twice"),
        ({"replicas_kubernetes": ("m/v", "m/v")}, "--replicas-kubernetes names one source twice"),
    ],
)
def test_options_that_cannot_be_served_are_refused(options, error):
    with pytest.raises(ConfigError) as raised:
        RouterConfig(**{"replicas": (), **options})

    assert error in str(raised.value)


async def test_a_bad_file_at_the_start_is_an_error(start_router, tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text(f"{A}\nhttp://\n")

    with pytest.raises(ConfigError, match=r"--replicas-file: .*: line 2, column 1: "):
        await start_router(replicas_file=path)


async def test_the_command_reads_its_file_again_on_sighup(replicas, tmp_path):
    """The real process, with no URL on its command line."""
    path = tmp_path / "replicas.txt"
    path.write_text(f"{replicas[0].url}\n")
    command = [sys.executable, "-m", "roost", "route", "--replicas-file", str(path), "--port", "0"]
    log = (tmp_path / "log").open("w+")
    process = await asyncio.create_subprocess_exec(*command, "--admin-port", "0", stderr=log)

    def said() -> str:
        return (tmp_path / "log").read_text()

    try:
        await until(lambda: "replica r0 is up" in said(), 30.0)
        replace(path, f"{replicas[1].url}\n")
        process.send_signal(signal.SIGHUP)
        await until(lambda: "replica r1 is up" in said(), 30.0)
        assert f"replica r0 leaves: {replicas[0].url}" in said()
    finally:
        process.terminate()
        async with asyncio.timeout(20):
            await process.wait()
        log.close()
    assert process.returncode == 0
