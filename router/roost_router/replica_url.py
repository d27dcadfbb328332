"""Which URLs may be a replica's. Pure.

A router sends prompts, and perhaps a key, to whatever it is told is a replica. Addresses that can
never be one, and that answer secrets to whoever asks from inside (a cloud's metadata service), are
refused however they are written: decimal, octal and hexadecimal numbers, IPv6 forms that embed an
IPv4 address, other alphabets, a trailing dot. Private networks are where replicas live: allowed.

Not here: names are not resolved. A name that leads to a metadata address is an operator's DNS
turned against the operator; redirects, which a replica could answer, are never followed (poll.py).
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

_VISIBLE = re.compile(r"[!-~]+")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")

#: Metadata services outside of the link-local range: AWS over IPv6, Alibaba, Azure, Oracle.
_METADATA = frozenset(
    map(ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"))
)
_METADATA_NAMES = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data"}
)
_NAT64 = IPv6Network("64:ff9b::/96")


class ReplicaUrlError(ValueError):
    """A URL that no replica can have; the message says why and what one looks like."""


def check_replica_url(url: str) -> None:
    """Raise ReplicaUrlError unless `url` may be a replica's base URL, without /v1."""
    parts = _split(url)
    if "@" in parts.netloc:
        raise ReplicaUrlError(f"'{parts.hostname}' is given with a user name: replicas take none")
    if parts.query or parts.fragment or "\\" in url:
        raise ReplicaUrlError(f"give '{url}' without a query, a fragment or a backslash")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ReplicaUrlError(f"give '{url}' without /v1: requests bring their own path")
    _check_host(parts.hostname or "", is_bracketed="[" in parts.netloc)


def url_key(url: str) -> str:
    """The same for all spellings of a replica's URL, which `check_replica_url` has let pass."""
    parts = urlsplit(url)
    host = (parts.hostname or "").removesuffix(".")
    if "[" in parts.netloc:
        host = f"[{ip_address(host)}]"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


def _split(url: str) -> SplitResult:
    try:
        # Checked before urlsplit, which drops tabs and line breaks silently.
        parts = urlsplit(url) if _VISIBLE.fullmatch(url) else None
        usable = parts is not None and parts.scheme in {"http", "https"} and parts.port != 0
    except ValueError:
        parts, usable = None, False
    if parts is None or not usable or not parts.hostname:
        raise ReplicaUrlError(
            f"{url!r} is not a replica's URL; it looks like http://127.0.0.1:8101"
        )
    return parts


def _check_host(host: str, *, is_bracketed: bool) -> None:
    if not is_bracketed:
        host = host.removesuffix(".")
        if host.lower() in _METADATA_NAMES:
            raise ReplicaUrlError(f"'{host}' is a cloud's metadata service, not a replica")
        # What ends in a number is an address to whoever connects (WHATWG URL, "ends in a number"),
        # and may then be decimal, octal or hexadecimal: only the form that all read alike is taken.
        if not _NUMBER.fullmatch(host.rpartition(".")[2]):
            if not _NAME.fullmatch(host):
                raise ReplicaUrlError(f"'{host}' is not a host name")
            return
    try:
        address = ip_address(host)
    except ValueError:
        raise ReplicaUrlError(
            f"'{host}' is not an IP address as all read it; write it like 10.0.0.7 or [fd00::7]"
        ) from None
    if not all(map(_is_usable, _meant(address))):
        raise ReplicaUrlError(
            f"'{host}' can be no replica: it is link-local, multicast, reserved, unspecified or a "
            "cloud's metadata service"
        )


def _is_usable(address: IPv4Address | IPv6Address) -> bool:
    if address.is_loopback:
        return True
    if isinstance(address, IPv4Address) and address.packed[0] == 0:
        return False  # "this network": connecting to it reaches this machine
    is_special = address.is_link_local or address.is_multicast or address.is_reserved
    return not (is_special or address.is_unspecified or address in _METADATA)


def _meant(address: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """The addresses that connecting may reach: what an IPv6 form embeds, else the address."""
    if isinstance(address, IPv4Address):
        return [address]
    if address.scope_id is not None:
        raise ReplicaUrlError(
            f"'{address}' names an interface: replicas have addresses of their own"
        )
    embedded = [address.ipv4_mapped, address.sixtofour]
    is_compatible = int(address) >> 32 == 0 and not (address.is_loopback or address.is_unspecified)
    if address in _NAT64 or is_compatible:
        embedded.append(IPv4Address(int(address) & 0xFFFFFFFF))
    found: list[IPv4Address | IPv6Address] = [form for form in embedded if form is not None]
    return found or [address]
