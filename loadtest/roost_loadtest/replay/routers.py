"""The routers of `roost bench replay`, as NAME or NAME:POLICY.

    roost                    ours as it comes; roost:POLICY: any of `roost route --policy`
    nginx:least_conn         and nginx:hash, by the session's key, bounded by nothing
    sglang-router:POLICY     all of its policies that need no other service; so for the next two
    smg:POLICY
    vllm-router:POLICY       kv_aware gets the mocks' KV events
    dynamo:MODE              its frontend's --router-mode, kv or round-robin; see dynamo_peer.py

Each runs with logs off and is otherwise as it comes. All get the same requests, with the session's
key in `x-session-id`, which some policies look at.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from roost_loadtest import bench_proxy_routers, fault_routers
from roost_loadtest.bench_proxy_routers import Target
from roost_loadtest.fault_routers import RouterKind
from roost_loadtest.local_processes import free_port
from roost_loadtest.peers import PeerError
from roost_loadtest.replay import dynamo_peer
from roost_loadtest.replay.driving import say
from roost_loadtest.replay.dynamo_peer import Engines
from roost_loadtest.replay.figures import Figures, NoAnswerError
from roost_loadtest.replay.prompts import MODEL

OURS = "roost"
DYNAMO = "dynamo"
DEFAULT = (
    OURS,
    "roost:round-robin",
    "nginx:least_conn",
    "nginx:hash",
    "sglang-router:cache_aware",
    "smg:cache_aware",
    "vllm-router:cache_aware",
    "vllm-router:kv_aware",
    "dynamo:kv",
)
_NGINX_METHODS = {
    "round_robin": "",
    "least_conn": "least_conn;",
    "hash": "hash $http_x_session_id consistent;",
}
_PEERS = ("nginx", "sglang-router", "smg", "vllm-router", DYNAMO)


class Choice(msgspec.Struct, frozen=True):
    """A router to measure."""

    label: str
    kind: RouterKind
    policy: str  # empty: as it comes

    @property
    def follows_caches(self) -> bool:
        """Whether it wants KV events."""
        return self.policy == "kv_aware" or self.kind.name == DYNAMO


def choose(
    labels: Sequence[str], programs: dict[str, Path | None]
) -> tuple[list[Choice], list[str]]:
    """The routers that are here, and a line for each that is not.

    ValueError for a name that is no router's, a balancing that nginx does not have, or where none
    is here.
    """
    others = {name: path for name, path in programs.items() if name != DYNAMO}
    found = {kind.name: kind for kind in fault_routers.find_peers(others)}
    found[OURS] = fault_routers.ours()
    if (python := programs.get(DYNAMO)) is not None:
        found[DYNAMO] = RouterKind(DYNAMO, str(python), dynamo_peer.version(python))
    choices, missing = [], []
    for label in labels:
        name, _, policy = label.partition(":")
        if name not in (OURS, *_PEERS):
            raise ValueError(f"{name} is not one of {', '.join((OURS, *_PEERS))}")
        if name == "nginx" and policy not in ("", *_NGINX_METHODS):
            raise ValueError(f"nginx balances by {', '.join(_NGINX_METHODS)}, not {policy}")
        if name in found:
            choices.append(Choice(label, found[name], policy))
        else:
            missing.append(f"{label} is left out: {name} is not installed, and no path was given")
    if not choices:
        raise ValueError("; ".join(missing) or "name a router")
    return choices, missing


def turned(items: Sequence[Choice], number: int) -> list[Choice]:
    """Another begins in each round."""
    start = number % max(1, len(items))
    return [*items[start:], *items[:start]]


@contextlib.contextmanager
def leaving_out(
    choice: Choice, choices: list[Choice], rows: dict[str, list[Figures]]
) -> Iterator[None]:
    """A peer that does not start, or answers nothing, takes no further part; ours must."""
    try:
        yield
    except (PeerError, NoAnswerError) as error:
        if choice.kind.name == OURS:
            raise
        say(f"{choice.label} is left out: {error}")
        choices.remove(choice)
        rows.pop(choice.label, None)


class Running(msgspec.Struct, frozen=True):
    """A router that answers. `helpers`: processes that it needs before engines."""

    target: Target
    admin_port: int
    helpers: list[int]


def start(
    stack: contextlib.ExitStack,
    choice: Choice,
    engines: Engines,
    probe: bytes,
    folder: Path,
    *,
    poll_interval_s: float = 1.0,
) -> Running:
    """Start it before these engines; it ends with `stack`. PeerError if it does not answer.

    `probe`: a request that it must answer. `poll_interval_s`: how often ours asks replicas for
    their load.
    """
    if choice.follows_caches and not engines.event_ports:
        raise PeerError(f"{choice.label} needs KV events, which these engines do not publish")
    port, admin_port = free_port(), free_port()
    helpers: list[int] = []
    if choice.kind.name == DYNAMO:
        home = Path(tempfile.mkdtemp(dir=folder))
        helpers = dynamo_peer.start_workers(stack, choice.kind.program, engines, home)
        command = dynamo_peer.frontend_command(
            choice.kind.program, port, choice.policy, home, engines.block_tokens
        )
    else:
        command = _command(
            choice, (port, admin_port), engines.ports, folder, poll_interval_s=poll_interval_s
        )
        if choice.follows_caches:
            command += _event_options(engines)
    started = bench_proxy_routers.start_command(
        choice.kind, command, (port, admin_port), probe, folder=folder
    )
    stack.callback(started.router.end)
    return Running(started.target, admin_port, helpers)


def _command(
    choice: Choice,
    ports: tuple[int, int],
    replicas: Sequence[int],
    folder: Path,
    *,
    poll_interval_s: float,
) -> list[str]:
    port, admin_port = ports
    addresses = [f"127.0.0.1:{replica}" for replica in replicas]
    urls = [f"http://{address}" for address in addresses]
    policy = ["--policy", choice.policy] if choice.policy else []
    here = ["--host", "127.0.0.1", "--port", str(port)]
    program = choice.kind.program
    match choice.kind.name:
        case "roost":
            command = [sys.executable, "-m", "roost", "route", *here, *policy]
            command += ["--admin-port", str(admin_port), "--poll-interval", str(poll_interval_s)]
            return command + [part for url in urls for part in ("--replica", url)]
        case "nginx":
            method = _NGINX_METHODS[choice.policy or "round_robin"]
            return bench_proxy_routers.nginx_command(program, port, addresses, folder, method)
        case name:
            verb = [] if name == "vllm-router" else ["launch"]
            quiet = ["--prometheus-port", str(admin_port), "--log-level", "error"]
            return [program, *verb, *here, *quiet, *policy, "--worker-urls", *urls]


def _event_options(engines: Engines) -> list[str]:
    block_tokens = str(engines.block_tokens)
    options = ["--kv-event-model", MODEL, "--kv-event-block-size", block_tokens]
    for replica, events in zip(engines.ports, engines.event_ports, strict=True):
        source = f"http://127.0.0.1:{replica}=tcp://127.0.0.1:{events}"
        options += ["--kv-event-source", source]
    return options
