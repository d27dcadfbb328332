"""What Kubernetes says of a service: its EndpointSlices, listed and watched. Pure.

    list    GET .../endpointslices?labelSelector=...            all slices, and a resourceVersion
    watch   the same with watch=1 and that version: a JSON object a line
                ADDED, MODIFIED, DELETED    one slice
                BOOKMARK                    a later resourceVersion, nothing else
                ERROR                       code 410: that version is too old, list again

A service has several slices: of 100 endpoints each, of two address families, by port. An endpoint
is a replica; its conditions say what to do with it (k8s.io/api/discovery/v1/types.go):

    ready         takes requests. Unset means true.
    terminating   its pod is being deleted: no new requests, and what it has goes on to its end.

One that is neither is starting, or its readiness probe fails: a member that drains, so that what is
known of it is still there when it is ready again, which for a busy engine may be a second later.

Where a service has addresses of both families only IPv4 counts: they are the same pods. Of an
endpoint's addresses the first does: they are alike, by the API's word.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec

from roost_router.discovery.roster import Told

_DNS_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_POD_NAME = re.compile(r"[-.a-z0-9]{1,253}")
_SERVICE_LABEL: Final = "kubernetes.io/service-name"
_FAMILIES: Final = ("IPv4", "IPv6", "FQDN")  # of which the first that there is counts
_GONE: Final = 410
_Kind = TypeVar("_Kind")


class ServiceNameError(ValueError):
    """What should name a service of Kubernetes does not."""


class SliceError(ValueError):
    """What the API said cannot be used."""


class ExpiredError(SliceError):
    """The resourceVersion is too old: list again."""


class ServiceName(NamedTuple):
    """A service, and its port by name or number; None: it has only one."""

    namespace: str
    service: str
    port: str | int | None

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        return f"{self.namespace}/{self.service}{port}"

    @property
    def path(self) -> str:
        """Path and query of its list."""
        label = quote(f"{_SERVICE_LABEL}={self.service}", safe="")
        api = f"/apis/discovery.k8s.io/v1/namespaces/{self.namespace}/endpointslices"
        return f"{api}?labelSelector={label}"


def parse_service_name(text: str) -> ServiceName:
    """NAMESPACE/SERVICE[:PORT]. Raises ServiceNameError."""
    namespace, slash, rest = text.partition("/")
    service, colon, port = rest.partition(":")
    is_named = slash and all(map(_DNS_LABEL.fullmatch, (namespace, service)))
    if not is_named or (colon and not _DNS_LABEL.fullmatch(port)):
        raise ServiceNameError(f"'{text}' is not NAMESPACE/SERVICE or NAMESPACE/SERVICE:PORT")
    if port.isdigit() and not 0 < int(port) < 65536:
        raise ServiceNameError(f"'{text}': there is no port {port}")
    number: str | int | None = int(port) if port.isdigit() else port or None
    return ServiceName(namespace, service, number)


class _Conditions(msgspec.Struct):
    ready: bool | None = None
    terminating: bool | None = None


class _Target(msgspec.Struct):
    name: str = ""


class _Endpoint(msgspec.Struct, rename="camel"):
    addresses: list[str]
    conditions: _Conditions | None = None
    target_ref: _Target | None = None


class _Port(msgspec.Struct, rename="camel"):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None
    app_protocol: str | None = None


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""


class _Slice(msgspec.Struct, rename="camel"):
    metadata: _Metadata
    address_type: str
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _List(msgspec.Struct):
    metadata: _Metadata
    items: list[_Slice] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Bookmark(msgspec.Struct):
    metadata: _Metadata


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class EndpointSlices:
    """All slices of one service, as of `resource_version`."""

    def __init__(self, port: str | int | None) -> None:
        self.resource_version = ""
        self._port: Final = port
        self._slices: dict[str, _Slice] = {}

    def replace(self, page: bytes) -> None:
        """A list was read. Raises SliceError."""
        found = _decoded(page, _List)
        if not found.metadata.resource_version:
            raise SliceError("a list without a resourceVersion")
        self._slices = {one.metadata.name: one for one in found.items or ()}
        self.resource_version = found.metadata.resource_version

    def apply(self, line: bytes) -> bool:
        """An event was read; whether it changed a slice. Raises ExpiredError or SliceError."""
        event = _decoded(line, _Event)
        if event.type == "BOOKMARK":
            self._advance(_decoded(event.object, _Bookmark).metadata)
            return False
        if event.type == "ERROR":
            status = _decoded(event.object, _Status)
            if status.code == _GONE:
                raise ExpiredError(status.message or "the resourceVersion is too old")
            raise SliceError(f"the watch ended with {status.code} {status.message}".rstrip())
        if event.type not in {"ADDED", "MODIFIED", "DELETED"}:
            raise SliceError(f"an event of type '{event.type[:40]}'")
        one = _decoded(event.object, _Slice)
        if not one.metadata.name:
            raise SliceError("a slice without a name")
        self._advance(one.metadata)
        if event.type == "DELETED":
            self._slices.pop(one.metadata.name, None)
        else:
            self._slices[one.metadata.name] = one
        return True

    def view(self) -> list[Told]:
        """The replicas, each once. Raises SliceError where no port can be chosen."""
        kinds = {one.address_type for one in self._slices.values() if one.endpoints}
        counts = next((family for family in _FAMILIES if family in kinds), "")
        found: dict[str, Told] = {}
        for one in self._slices.values():
            if one.address_type != counts or not one.endpoints:
                continue
            scheme, port = self._chosen_port(one.ports or [])
            for endpoint in one.endpoints:
                if not endpoint.addresses:
                    continue
                host = endpoint.addresses[0]
                host = f"[{host}]" if ":" in host else host
                told = _told(f"{scheme}://{host}:{port}", endpoint)
                before = found.get(told.url)
                # While slices are being split an endpoint may be in two of them, one of them late.
                if before is None or before.is_draining:
                    found[told.url] = told
        return list(found.values())

    def _advance(self, metadata: _Metadata) -> None:
        if not metadata.resource_version:
            raise SliceError("an event without a resourceVersion")
        self.resource_version = metadata.resource_version

    def _chosen_port(self, ports: list[_Port]) -> tuple[str, int]:
        usable = [port for port in ports if port.protocol in {None, "TCP"} and port.port]
        if isinstance(self._port, int):
            match = [port for port in usable if port.port == self._port]
            return _scheme(match), self._port  # a pod is reached at any port, told or not
        if self._port is not None:
            usable = [port for port in usable if port.name == self._port]
        if len(usable) == 1 and usable[0].port is not None:
            return _scheme(usable), usable[0].port
        names = ", ".join(f"{port.name or ''}:{port.port}" for port in ports) or "none"
        which = "no port of its own" if self._port is None else f"no port '{self._port}'"
        raise SliceError(f"the service has {which} to take; its ports are {names}")


def _scheme(ports: list[_Port]) -> str:
    return "https" if ports and ports[0].app_protocol == "https" else "http"


def _told(url: str, endpoint: _Endpoint) -> Told:
    conditions = endpoint.conditions or _Conditions()
    is_draining = conditions.ready is False or conditions.terminating is True
    name = "" if endpoint.target_ref is None else endpoint.target_ref.name
    return Told(url, name if _POD_NAME.fullmatch(name) else "", is_draining)


def _decoded(data: bytes | msgspec.Raw, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SliceError(f"not what the API says: {error}") from None
