"""The simulated world keeps what asyncio and TCP promise; else its findings would mean nothing."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from roost_loadtest.simulation.loop import StuckError, VirtualLoop
from roost_loadtest.simulation.network import Conditions, Network


class Recorder(asyncio.Protocol):
    def __init__(self):
        self.data = b""
        self.events = []

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data

    def pause_writing(self):
        self.events.append("pause")

    def resume_writing(self):
        self.events.append("resume")

    def connection_lost(self, exc):
        self.events.append(type(exc).__name__ if exc else "closed")


class World:
    """A router's host that dials a host called "a", on which a Recorder listens."""

    def __init__(self, seed=1, **conditions):
        rng = Random(seed)
        self.loop = VirtualLoop(rng, max_steps=100_000, max_time_s=100.0)
        self.network = Network(self.loop, rng, Conditions(**conditions))
        self.host = self.network.add_host("a")
        self.far = Recorder()
        self.host.listener = lambda: self.far

    def run(self, steps):
        async def main():
            _, near = await self.loop.create_connection(Recorder, "a", 1)
            await steps(near)
            return near

        return self.loop.run(main())


def test_time_jumps_and_callbacks_keep_their_order():
    loop = VirtualLoop(Random(1), max_steps=1000, max_time_s=1e6)
    order = []

    async def main():
        loop.call_later(3600.0, order.append, "later")
        for number in range(20):
            loop.call_soon(order.append, number)
        await asyncio.sleep(3601.0)

    loop.run(main())

    assert order == [*range(20), "later"]
    assert loop.time() >= 3601.0


@pytest.mark.parametrize("seed", range(20))
def test_bytes_arrive_whole_and_in_order_however_they_are_cut(seed):
    sent = Random(seed).randbytes(20_000)
    world = World(seed, slice_share=0.8, window_bytes=700)

    async def steps(near):
        for start in range(0, len(sent), 999):
            near.transport.write(sent[start : start + 999])
            await asyncio.sleep(0.001)
        near.transport.close()
        await asyncio.sleep(60.0)

    near = world.run(steps)

    assert world.far.data == sent
    assert world.far.events == ["closed"]
    assert near.events[-1] == "closed"


def test_a_reader_that_stops_pauses_the_writer_and_lets_it_go_on():
    world = World(window_bytes=1000, buffer_scale=64)  # a high water mark of 1 KiB

    async def steps(near):
        await asyncio.sleep(0.1)
        world.far.transport.pause_reading()
        near.transport.write(b"x" * 1900)
        assert near.events == []
        near.transport.write(b"x" * 200)
        assert near.events == ["pause"]
        world.far.transport.resume_reading()
        await asyncio.sleep(1.0)

    near = world.run(steps)

    assert near.events == ["pause", "resume"]
    assert len(world.far.data) == 2100


def test_closing_with_unread_bytes_resets_the_connection():
    world = World()

    async def steps(near):
        await asyncio.sleep(0.1)
        world.far.transport.pause_reading()
        near.transport.write(b"unread")
        await asyncio.sleep(0.1)
        world.far.transport.close()
        await asyncio.sleep(0.1)

    assert world.run(steps).events == ["ConnectionResetError"]


def test_a_frozen_host_accepts_and_answers_when_it_thaws():
    world = World()
    world.host.freeze()

    async def steps(near):
        near.transport.write(b"hello")
        await asyncio.sleep(10.0)
        assert world.far.data == b""
        world.host.thaw()
        await asyncio.sleep(0.1)

    world.run(steps)

    assert world.far.data == b"hello"


def test_nothing_passes_to_a_host_without_network_and_nothing_is_lost():
    world = World()

    async def steps(near):
        await asyncio.sleep(0.1)
        world.host.disconnect()
        near.transport.write(b"hello")
        await asyncio.sleep(10.0)
        assert world.far.data == b""
        world.host.reconnect()
        await asyncio.sleep(0.1)

    world.run(steps)

    assert world.far.data == b"hello"


def test_a_killed_host_closes_its_connections_and_refuses_new_ones():
    world = World()

    async def steps(near):
        world.host.kill()
        await asyncio.sleep(0.1)
        assert near.events == ["closed"]
        with pytest.raises(ConnectionRefusedError):
            await world.loop.create_connection(Recorder, "a", 1)

    world.run(steps)


@pytest.mark.parametrize("seed", range(30))
def test_a_dial_that_is_given_up_leaves_no_connection(seed):
    world = World(seed, latency_s=0.01)

    async def steps(near):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(Random(seed).random() * 0.01):
                await world.loop.create_connection(Recorder, "a", 1)
        near.transport.close()
        await asyncio.sleep(1.0)

    world.run(steps)

    assert not world.network.router.transports


def test_what_a_protocol_raises_ends_its_connection_and_is_kept():
    world = World()

    async def steps(near):
        near.data_received = lambda data: 1 / 0
        world.far.transport.write(b"x")
        await asyncio.sleep(0.1)

    near = world.run(steps)

    assert near.events == ["closed"]
    assert "ZeroDivisionError" in world.loop.unhandled[0]


def test_a_run_that_never_ends_is_stopped():
    loop = VirtualLoop(Random(1), max_steps=1000, max_time_s=10.0)

    async def forever():
        while True:
            await asyncio.sleep(1.0)

    with pytest.raises(StuckError, match="virtual time"):
        loop.run(forever())
