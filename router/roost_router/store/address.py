"""Where the store is: the URL that `--redis` takes. Pure.

    redis://[user[:password]@]host[:port][/db]             rediss://...            over TLS
    unix://[user[:password]@]/path/to/redis.sock
    redis+sentinel://[...@]host[:port],host[:port]/service[/db]    rediss+sentinel://...
    redis+cluster://[...@]host[:port],host[:port]          rediss+cluster://...

A host is a name, an IPv4 address, or an IPv6 address in brackets. User and password are
percent-decoded; with a password alone the user is Redis's `default`.

Invariants: no repr and no message here shows a password, so messages show no more of a URL than
what follows its last @.

Not here: files are not read. The password of a file is given as text; certificates are paths.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple
from urllib.parse import unquote

import msgspec

_URL = re.compile(r"(?P<scheme>[a-z+]+)://(?P<rest>.+)", re.DOTALL)
_VISIBLE = re.compile(r"[!-~]+")
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>\d+))?")
_DB = re.compile(r"[0-9]{1,5}")
_FORMS = "redis://host:6379, unix:///path, redis+sentinel://host,host/service, redis+cluster://host"
_REDIS_PORT, _SENTINEL_PORT = 6379, 26379


class AddressError(ValueError):
    """Options that name no store; one line that says what to write instead."""


class Mode(Enum):
    """How the server that takes our writes is found."""

    SINGLE = "single"
    UNIX = "unix"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_MODES = {
    "redis": Mode.SINGLE,
    "rediss": Mode.SINGLE,
    "unix": Mode.UNIX,
    "redis+sentinel": Mode.SENTINEL,
    "rediss+sentinel": Mode.SENTINEL,
    "redis+cluster": Mode.CLUSTER,
    "rediss+cluster": Mode.CLUSTER,
}


class Node(NamedTuple):
    """A server to connect to; with port 0 `host` is the path of a socket."""

    host: str
    port: int

    def __str__(self) -> str:
        """As logs and errors show it."""
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class StoreAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the store is, and as whom to go there."""

    mode: Mode
    nodes: tuple[Node, ...]  # of a cluster, or its sentinels: those that are asked first
    service: str = ""  # what sentinels call the primary
    db: int = 0
    user: str = ""
    password: str = ""
    tls: bool = False
    ca_file: str = ""  # whom to trust; empty: whom the system does
    cert_file: str = ""  # who we are, where servers ask for it
    key_file: str = ""

    def __repr__(self) -> str:
        """Without the password."""
        return f"StoreAddress({self})"

    def __str__(self) -> str:
        """The URL without user and password."""
        scheme = "rediss" if self.tls else "redis"
        if self.mode is Mode.UNIX:
            return f"unix://{self.nodes[0]}"
        hosts = ",".join(map(str, self.nodes))
        db = f"/{self.db}" if self.db else ""
        match self.mode:
            case Mode.SENTINEL:
                return f"{scheme}+sentinel://{hosts}/{self.service}{db}"
            case Mode.CLUSTER:
                return f"{scheme}+cluster://{hosts}"
            case _:
                return f"{scheme}://{hosts}{db}"


def parse_address(
    url: str,
    *,
    password: str = "",
    ca_file: str = "",
    cert_file: str = "",
    key_file: str = "",
) -> StoreAddress:
    """The address that a URL and the options beside it stand for. Raises AddressError.

    `password`: what a file held, instead of one in the URL.
    """
    found = _URL.fullmatch(url)
    scheme, rest = (found["scheme"], found["rest"]) if found else ("", "")
    secure = scheme.startswith("rediss")
    mode = _MODES.get(scheme)
    if mode is None:
        raise AddressError(f"--redis takes {_FORMS}, and the same with rediss for TLS")
    user, in_url, place = _credentials(rest)
    if in_url and password:
        raise AddressError("the password of Redis is given twice: in --redis and in a file")
    if not secure and (ca_file or cert_file or key_file):
        raise AddressError("certificates are for TLS: write rediss:// in --redis")
    if bool(cert_file) != bool(key_file):
        raise AddressError("a client's certificate and its key are given together")
    if not _VISIBLE.fullmatch(place) or re.search(r"[?#\\@]", place):
        raise AddressError("--redis takes no blanks, queries, fragments or backslashes")
    common = StoreAddress(
        mode=mode,
        nodes=(),
        user=user or ("default" if in_url or password else ""),
        password=in_url or password,
        tls=secure,
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
    )
    if user and not common.password:
        raise AddressError(f"--redis names the user {user} without a password")
    return msgspec.structs.replace(common, **_place(common.mode, place))


def _credentials(rest: str) -> tuple[str, str, str]:
    """User, password, and what follows."""
    before, at, place = rest.rpartition("@")
    user, _, password = before.partition(":")
    if at and not (user or password):
        raise AddressError("--redis has an @ with neither user nor password before it")
    return unquote(user), unquote(password), place


def _place(mode: Mode, place: str) -> dict[str, object]:
    """The fields of an address that say where."""
    if mode is Mode.UNIX:
        if not place.startswith("/") or place.endswith("/"):
            raise AddressError(f"unix://{place} is no path: write unix:///path/to/redis.sock")
        return {"nodes": (Node(place, 0),)}
    hosts, *path = place.rstrip("/").split("/") if mode is Mode.SINGLE else place.split("/")
    default_port = _SENTINEL_PORT if mode is Mode.SENTINEL else _REDIS_PORT
    nodes = tuple(_node(text, default_port) for text in hosts.split(","))
    fields: dict[str, object] = {"nodes": nodes}
    if mode is Mode.SINGLE and len(nodes) > 1:
        raise AddressError("several hosts are for redis+sentinel:// and redis+cluster://")
    if mode is Mode.CLUSTER and any(path):
        raise AddressError("a cluster has one database: write redis+cluster:// without a path")
    if mode is Mode.SENTINEL:
        if not path or not path[0]:
            raise AddressError(f"name the service: redis+sentinel://{hosts}/service")
        fields["service"] = unquote(path.pop(0))
    if mode is not Mode.CLUSTER and path:
        if len(path) > 1 or not _DB.fullmatch(path[0]):
            raise AddressError(f"'{'/'.join(path)}' in --redis is no number of a database")
        fields["db"] = int(path[0])
    return fields


def _node(text: str, default_port: int) -> Node:
    found = _HOST.fullmatch(text)
    port = int(found["port"] or default_port) if found else 0
    if found is None or not 0 < port < 65536:
        raise AddressError(f"'{text}' in --redis is no host, or host:port")
    return Node(found["six"] or found["name"], port)
