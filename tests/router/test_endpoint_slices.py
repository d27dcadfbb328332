"""EndpointSlices as the Kubernetes API writes them: lists, events, and what cannot be read."""

from __future__ import annotations

import copy
import json

import pytest

from roost_router.discovery.endpoint_slices import (
    EndpointSlices,
    ExpiredError,
    ServiceName,
    ServiceNameError,
    SliceError,
    parse_service_name,
)
from roost_router.discovery.roster import Told

# As `kubectl get endpointslices -o json` prints them, but for what nobody reads here.
SLICE = {
    "addressType": "IPv4",
    "apiVersion": "discovery.k8s.io/v1",
    "endpoints": [
        {
            "addresses": ["10.244.1.7"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": "gpu-1",
            "targetRef": {
                "kind": "Pod",
                "name": "vllm-7d4b9c-x2x9q",
                "namespace": "models",
                "uid": "8a1f6c0e-3c0e-4c59-9a0f-0d4f7a1f2b11",
            },
            "zone": "a",
        },
        {
            "addresses": ["10.244.2.9"],
            "conditions": {"ready": False, "serving": True, "terminating": True},
            "targetRef": {"kind": "Pod", "name": "vllm-7d4b9c-k8s2d", "namespace": "models"},
        },
    ],
    "kind": "EndpointSlice",
    "metadata": {
        "creationTimestamp": "2026-11-02T10:11:12Z",
        "generateName": "vllm-",
        "generation": 7,
        "labels": {
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": "vllm",
        },
        "name": "vllm-abc12",
        "namespace": "models",
        "resourceVersion": "100",
    },
    "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
}
X = Told("http://10.244.1.7:8000", "vllm-7d4b9c-x2x9q")
K = Told("http://10.244.2.9:8000", "vllm-7d4b9c-k8s2d", is_draining=True)


def changed(one: dict, **metadata) -> dict:
    """A copy with another name or version."""
    one = copy.deepcopy(one)
    one["metadata"].update(metadata)
    return one


def page(*slices: dict, version: str = "100") -> bytes:
    metadata = {"resourceVersion": version}
    kind = {"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1"}
    return json.dumps({**kind, "metadata": metadata, "items": list(slices)}).encode()


def event(kind: str, thing: dict) -> bytes:
    return json.dumps({"type": kind, "object": thing}).encode()


def listed(*slices: dict, port: str | int | None = None) -> EndpointSlices:
    found = EndpointSlices(port)
    found.replace(page(*slices))
    return found


def with_endpoint(**endpoint) -> dict:
    one = copy.deepcopy(SLICE)
    one["endpoints"] = [{"addresses": ["10.244.1.7"], **endpoint}]
    return one


def test_endpoints_are_replicas_and_terminating_ones_drain():
    found = listed(SLICE)

    assert found.view() == [X, K]
    assert found.resource_version == "100"


@pytest.mark.parametrize(
    ("conditions", "is_draining"),
    [
        (None, False),
        ({}, False),
        ({"ready": None}, False),
        ({"ready": True}, False),
        ({"ready": False}, True),
        ({"ready": False, "serving": False, "terminating": False}, True),
        ({"ready": True, "terminating": True}, True),  # publishNotReadyAddresses
        ({"ready": False, "serving": True, "terminating": True}, True),
        ({"ready": False, "serving": False, "terminating": True}, True),
    ],
)
def test_conditions_that_are_unset_mean_ready(conditions, is_draining):
    more = {} if conditions is None else {"conditions": conditions}

    [told] = listed(with_endpoint(**more)).view()

    assert told.is_draining is is_draining


def test_events_change_slices_and_advance_the_version():
    found = listed(SLICE)
    other = changed(SLICE, name="vllm-def34", resourceVersion="101")
    other["endpoints"] = [{"addresses": ["10.244.3.3"]}]

    assert found.apply(event("ADDED", other))
    assert [told.url for told in found.view()][2:] == ["http://10.244.3.3:8000"]
    assert not found.apply(
        event("BOOKMARK", {"kind": "EndpointSlice", "metadata": {"resourceVersion": "150"}})
    )
    assert found.resource_version == "150"
    less = changed(SLICE, resourceVersion="151")
    less["endpoints"] = less["endpoints"][:1]
    assert found.apply(event("MODIFIED", less))
    assert found.apply(event("DELETED", changed(other, resourceVersion="152")))

    assert found.view() == [X]
    assert found.resource_version == "152"


def test_a_list_replaces_all_that_was_known():
    found = listed(SLICE, changed(SLICE, name="other"))

    found.replace(page(version="200"))

    assert found.view() == []
    assert found.resource_version == "200"


def test_what_is_no_name_of_a_pod_is_not_told():
    [told] = listed(with_endpoint(targetRef={"name": "a\nb"})).view()

    assert told.name == ""


def test_slices_without_endpoints_or_ports_are_read():
    empty = changed(SLICE, name="empty") | {"endpoints": None, "ports": None}

    assert listed(SLICE, empty).view() == [X, K]


def test_an_endpoint_in_two_slices_counts_once_and_ready_wins():
    late = changed(SLICE, name="late")
    late["endpoints"] = [
        {"addresses": ["10.244.1.7"], "conditions": {"ready": False}, "targetRef": {"name": "old"}}
    ]

    assert listed(late, SLICE).view() == [X, K]
    assert listed(SLICE, late).view() == [X, K]


def test_of_two_families_ipv4_counts_and_ipv6_where_there_is_no_other():
    six = changed(SLICE, name="six") | {"addressType": "IPv6"}
    six["endpoints"] = [{"addresses": ["fd00::7", "fd00::8"]}]

    assert listed(six, SLICE).view() == [X, K]
    assert listed(six).view() == [Told("http://[fd00::7]:8000")]


@pytest.mark.parametrize(
    ("port", "ports", "url"),
    [
        (None, [{"name": "", "port": 80}], "http://10.244.1.7:80"),
        ("http", [{"name": "metrics", "port": 1}, {"name": "http", "port": 2}], "http://10.244.1.7:2"),
        (8000, [], "http://10.244.1.7:8000"),
        (8000, [{"name": "http", "port": 2}], "http://10.244.1.7:8000"),
        (None, [{"name": "dns", "port": 53, "protocol": "UDP"}, {"port": 7}], "http://10.244.1.7:7"),
        (None, [{"port": 443, "appProtocol": "https"}], "https://10.244.1.7:443"),
        (443, [{"port": 443, "appProtocol": "https"}], "https://10.244.1.7:443"),
    ],
)  # fmt: skip
def test_the_port_is_named_or_numbered_or_the_only_one(port, ports, url):
    one = with_endpoint() | {"ports": ports}

    assert [told.url for told in listed(one, port=port).view()] == [url]


@pytest.mark.parametrize(
    ("port", "ports", "why"),
    [
        (None, [], "no port of its own to take; its ports are none"),
        (None, [{"name": "a", "port": 1}, {"name": "b", "port": 2}], "its ports are a:1, b:2"),
        ("http", [{"name": "web", "port": 80}], "no port 'http' to take; its ports are web:80"),
    ],
)
def test_where_no_port_can_be_chosen_the_ports_are_told(port, ports, why):
    with pytest.raises(SliceError, match=why):
        listed(with_endpoint() | {"ports": ports}, port=port).view()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b'{"type":"ADDED"}',
        b'{"type":"ADDED","object":{}}',
        b'{"type":"ADDED","object":null}',
        event("MERGED", SLICE),
        event("ADDED", changed(SLICE, name="")),
        event("ADDED", changed(SLICE, resourceVersion="")),
        event("ADDED", SLICE | {"endpoints": [{"addresses": "10.0.0.1"}]}),
        event("ADDED", SLICE | {"ports": [{"port": "eighty"}]}),
        event("BOOKMARK", {"metadata": {}}),
        event("ERROR", {"kind": "Status", "code": 500, "message": "etcd is gone"}),
        b'{"type":"ADDED","object":' + b"[" * 100_000,
    ],
)
def test_events_that_cannot_be_read_change_nothing(line):
    found = listed(SLICE)

    with pytest.raises(SliceError) as raised:
        found.apply(line)

    assert not isinstance(raised.value, ExpiredError)
    assert found.view() == [X, K]


def test_a_version_that_is_too_old_is_told_apart():
    status = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "too old resource version: 100 (4711)",
        "reason": "Expired",
        "code": 410,
    }

    with pytest.raises(ExpiredError, match=r"too old resource version: 100 \(4711\)"):
        listed(SLICE).apply(event("ERROR", status))


@pytest.mark.parametrize("data", [b"", b"{}", b'{"metadata":{},"items":[]}', page(SLICE)[:-9]])
def test_a_list_that_cannot_be_read_is_none(data):
    with pytest.raises(SliceError):
        EndpointSlices(None).replace(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models/vllm", ServiceName("models", "vllm", None)),
        ("models/vllm:http", ServiceName("models", "vllm", "http")),
        ("m-1/v-2:8000", ServiceName("m-1", "v-2", 8000)),
        (f"{'a' * 63}/b:65535", ServiceName("a" * 63, "b", 65535)),
    ],
)
def test_a_service_is_named_with_its_namespace(text, expected):
    name = parse_service_name(text)

    assert name == expected
    assert str(name) == text
    assert name.path.startswith(f"/apis/discovery.k8s.io/v1/namespaces/{name.namespace}/")
    assert name.path.endswith(f"?labelSelector=kubernetes.io%2Fservice-name%3D{name.service}")


@pytest.mark.parametrize(
    "text",
    ["", "vllm", "/vllm", "models/", "models/vllm:", "a/b/c", "Models/vllm", "m/v:65536", "m/v:0",
     f"{'a' * 64}/b", "m/../secrets", "m/v?x=y", "m/v:http&watch", "-m/v"],
)  # fmt: skip
def test_what_is_no_service_is_refused(text):
    with pytest.raises(ServiceNameError):
        parse_service_name(text)
