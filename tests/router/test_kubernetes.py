"""A router in a pod: EndpointSlices from a real HTTPS server, and all that goes wrong with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
from asking import complete, fleet, get, until
from kubernetes_api import NO_OPENSSL, KubernetesApi, endpoint_slice, make_certificate

from roost_router import app
from roost_router.config import ConfigError, RouterConfig, kubernetes_api_url
from roost_router.discovery import kubernetes
from roost_router.discovery.endpoint_slices import parse_service_name
from roost_router.discovery.follow import Discovery
from roost_router.discovery.kubernetes import KubernetesSource
from roost_router.fleet.fleet import Fleet
from roost_router.fleet.replica import Membership
from roost_router.http import lines
from roost_router.index.prefix_index import PrefixIndex

A, B = "http://127.0.0.1:8101", "http://127.0.0.1:8102"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("account")
    if not make_certificate(folder):
        pytest.skip(NO_OPENSSL)
    return folder


@pytest.fixture
async def api(certificate) -> AsyncIterator[KubernetesApi]:
    server = await KubernetesApi(certificate, "first-token").start()
    yield server
    await server.stop()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Waits of hundredths of seconds instead of seconds."""
    monkeypatch.setattr(kubernetes, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(kubernetes, "MAX_WAIT_S", 0.1)
    monkeypatch.setattr(kubernetes, "_MIN_WATCH_S", 0.02)


def source(api: KubernetesApi, watch_s: float = 60.0) -> KubernetesSource:
    service = parse_service_name("models/vllm")
    return KubernetesSource(service, api.url, Random(1), api.folder, watch_s)


class Following:
    def __init__(self, api: KubernetesApi, watch_s: float) -> None:
        self.fleet = Fleet(PrefixIndex(), [])
        self.discovery = Discovery(self.fleet, [source(api, watch_s)], time.monotonic)

    def urls(self) -> list[str]:
        return sorted(replica.url for replica in self.fleet.replicas)

    def reason(self) -> str | None:
        [status] = self.discovery.status()
        return None if status.failing_since is None else status.reason


@asynccontextmanager
async def following(api: KubernetesApi, watch_s: float = 60.0) -> AsyncIterator[Following]:
    found = Following(api, watch_s)
    task = asyncio.create_task(found.discovery.run())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not api.num_watchers)


async def test_endpoints_join_drain_and_leave_as_they_are_watched(api):
    api.put(endpoint_slice("a", A))
    async with following(api) as found:
        await until(lambda: found.urls() == [A])
        await until(lambda: api.num_watchers == 1)
        api.put(endpoint_slice("b", B))
        await until(lambda: found.urls() == [A, B])

        api.put(endpoint_slice("a", A, ready=False, terminating=True))
        first = found.fleet.find(A)
        await until(lambda: first.membership is Membership.DRAINING)
        api.delete("a")
        await until(lambda: found.urls() == [B])

        assert first.membership is Membership.GONE
        assert len(api.lists) == 1
        assert api.watches[0] == {
            "labelSelector": "kubernetes.io/service-name=vllm",
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": "60",
            "resourceVersion": "101",
        }
        assert {authorization for authorization, _ in api.requests} == {"Bearer first-token"}


async def test_a_watch_that_ends_goes_on_from_the_last_version(api):
    api.put(endpoint_slice("a", A))
    async with following(api, watch_s=1.0) as found:
        await until(lambda: api.num_watchers == 1)
        api.bookmark()
        await until(lambda: len(api.watches) >= 2)
        api.put(endpoint_slice("b", B))
        await until(lambda: found.urls() == [A, B])

    assert len(api.lists) == 1
    assert api.watches[1]["resourceVersion"] == "102"


async def test_a_watch_that_breaks_is_made_up_for_by_a_list(api, caplog):
    caplog.set_level("INFO")
    api.put(endpoint_slice("a", A))
    async with following(api) as found:
        await until(lambda: api.num_watchers == 1)
        api.break_watches()
        api.put(endpoint_slice("b", B))  # nobody hears it
        await until(lambda: found.urls() == [A, B])

        assert len(api.lists) == 2
        assert found.reason() is None
    assert "the API server closed the connection; replicas stay as they are" in caplog.text
    assert "Kubernetes models/vllm answers again" in caplog.text


async def test_an_api_server_that_is_away_changes_nothing_and_is_told(api):
    api.put(endpoint_slice("a", A))
    async with following(api) as found:
        await until(lambda: api.num_watchers == 1)
        await api.stop()
        await until(lambda: (found.reason() or "").startswith("the API server cannot be reached"))
        assert found.urls() == [A]

        api.put(endpoint_slice("b", B))
        await api.start()
        await until(lambda: found.urls() == [A, B])

        assert found.reason() is None


@pytest.mark.parametrize("is_event", [True, False])
async def test_a_version_that_is_too_old_is_listed_again_at_once(api, is_event, monkeypatch):
    """As an event within a watch, or as the status of the next one. Nothing failed."""
    monkeypatch.setattr(kubernetes, "FIRST_WAIT_S", 60.0)
    monkeypatch.setattr(kubernetes, "MAX_WAIT_S", 60.0)
    api.put(endpoint_slice("a", A))
    async with following(api, watch_s=60.0 if is_event else 1.0) as found:
        await until(lambda: api.num_watchers == 1)
        reasons = []
        if is_event:
            api.expire()
        else:
            api.oldest = api.version = api.version + 1
        await until(lambda: reasons.append(found.reason()) or len(api.lists) == 2)
        await until(lambda: len(api.watches) >= 2 and api.num_watchers == 1)

        assert set(reasons) == {None}
        assert api.watches[-1]["resourceVersion"] == str(api.version)
        assert found.urls() == [A]


async def test_a_token_that_was_replaced_is_used_from_the_next_request_on(api):
    api.put(endpoint_slice("a", A))
    async with following(api, watch_s=1.0) as found:
        await until(lambda: api.num_watchers == 1)
        api.token = "second-token"
        (api.folder / "token").write_text("second-token\n")
        num_before = len(api.requests)
        await until(lambda: len(api.requests) > num_before)

        assert api.requests[num_before][0] == "Bearer second-token"
        assert found.reason() is None


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (401, "it answered 401: the service account's token is not accepted"),
        (403, "it answered 403: the service account needs a role"),
        (404, "it answered 404: there is no discovery.k8s.io/v1"),
        (500, "it answered 500"),
    ],
)
async def test_a_refusal_is_told_with_its_cure_and_tried_again(api, status, why):
    api.fail_next = [status] * 3
    api.put(endpoint_slice("a", A))
    async with following(api) as found:
        await until(lambda: found.reason() is not None)
        assert found.reason().startswith(why)

        await until(lambda: found.urls() == [A])
        assert found.reason() is None


@pytest.mark.parametrize(
    "line", [b"{", b'{"type":"MERGED","object":{}}', b'{"type":"ADDED","object":{}}', b"\xff"]
)
async def test_an_event_that_cannot_be_read_is_made_up_for_by_a_list(api, line):
    api.put(endpoint_slice("a", A))
    async with following(api) as found:
        await until(lambda: api.num_watchers == 1)
        api.send(line)
        await until(lambda: len(api.lists) == 2)
        await until(lambda: len(api.watches) == 2)

        assert found.urls() == [A]


async def test_a_line_without_end_is_no_memory_without_end(api, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    api.put(endpoint_slice("a", A))
    async with following(api) as found:
        await until(lambda: api.num_watchers == 1)
        for writer in api._watchers:
            writer.write(b"7d0\r\n" + b" " * 2000 + b"\r\n")
        await until(lambda: len(api.lists) == 2)

        assert found.urls() == [A]


async def test_many_events_at_once_all_count(api):
    """More than wait unread: the sender is held up, and nothing is lost."""
    async with following(api) as found:
        await until(lambda: api.num_watchers == 1)
        for number in range(600):
            api.put(endpoint_slice(f"s{number}", f"http://10.0.{number >> 8}.{number & 255}:80"))
        await until(lambda: len(found.fleet.replicas) == 600)

        assert len(api.lists) == 1


async def test_a_silent_watch_is_left_when_it_should_have_ended(api, monkeypatch):
    """A connection that died without a word: nothing comes, not even its end."""
    monkeypatch.setattr(kubernetes, "_SLACK_S", 0.2)
    api.is_polite = False
    api.put(endpoint_slice("a", A))
    async with following(api, watch_s=0.1) as found:
        await until(lambda: len(api.lists) >= 2)

        assert found.urls() == [A]


async def test_a_server_that_another_authority_signed_is_not_believed(api, tmp_path):
    assert make_certificate(tmp_path)
    (tmp_path / "token").write_text(api.token)
    elsewhere = KubernetesSource(parse_service_name("models/vllm"), api.url, Random(1), tmp_path)
    answers = elsewhere.answers()

    failed = await anext(answers)

    assert "CERTIFICATE_VERIFY_FAILED" in failed.reason
    assert api.requests == []  # it has not seen our token
    await answers.aclose()


async def test_without_a_token_nothing_is_asked(api, tmp_path):
    without = KubernetesSource(parse_service_name("models/vllm"), api.url, Random(1), tmp_path)
    answers = without.answers()

    failed = await anext(answers)

    assert failed.reason.startswith("there is no service account's token")
    await answers.aclose()


async def test_a_router_serves_what_kubernetes_tells(api, start_router, replicas, monkeypatch):
    """From nobody over a rolling update to nobody, under requests."""
    monkeypatch.setattr(app, "make_sources", lambda _config, _rng: [source(api)])
    router = await start_router(replicas_kubernetes=("models/vllm",))
    assert (await get(router, "/ready"))[0] == 503
    assert await complete(router) == 503

    await until(lambda: api.num_watchers == 1)
    api.put(endpoint_slice("old", replicas[0].url))
    await until(lambda: router.placer.fleet.is_ready)
    assert await complete(router) == 200
    api.put(endpoint_slice("new", replicas[1].url))
    await until(lambda: len(router.placer.fleet.models().get("m", ())) == 2)
    api.put(endpoint_slice("old", replicas[0].url, ready=False, terminating=True))
    await until(lambda: len(router.placer.fleet.models()["m"]) == 1)
    num_before = len(replicas[0].bodies)
    assert [await complete(router) for _ in range(5)] == [200] * 5
    page = await fleet(router)
    api.delete("old")
    await until(lambda: len(router.placer.fleet.replicas) == 1)

    assert len(replicas[0].bodies) == num_before
    assert sorted(row.state for row in page.replicas) == ["draining", "up"]
    [told] = (await fleet(router)).sources
    assert (told.name, told.replicas, told.failing_s) == ("Kubernetes models/vllm", 1, None)
    _, series, _ = await get(router, "/metrics")
    label = b'{source="Kubernetes models/vllm"}'
    assert b"roost_router_discovery_replicas" + label + b" 1.0" in series
    assert b"roost_router_discovery_failing_seconds" + label + b" 0.0" in series


def test_the_api_server_is_where_the_environment_of_a_pod_says(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="this is no pod"):
        kubernetes_api_url()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT_HTTPS", "6443")
    assert kubernetes_api_url() == "https://10.96.0.1:6443"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")

    assert kubernetes_api_url() == "https://[fd00::1]:6443"


def test_a_service_that_is_none_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="'vllm' is not NAMESPACE/SERVICE"):
        RouterConfig(replicas=(), replicas_kubernetes=("vllm",))
