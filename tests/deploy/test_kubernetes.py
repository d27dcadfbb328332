"""Kubernetes manifests: valid, strictly, as kustomize renders them; closed; in time to drain."""

from __future__ import annotations

import functools
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deployed import DEPLOY, CommandLine, complaints

KUSTOMIZE = DEPLOY / "kustomize"
OVERLAYS = ["dev", "ha", "single-gpu"]
#: Kinds of others, which no schema comes with: their tests are of their own, below.
OTHERS = {"PodMonitor", "PrometheusRule", "ScaledObject"}
#: Plain manifests, which need no kustomize to be read.
FILES = sorted({*KUSTOMIZE.glob("base/*.yaml"), *KUSTOMIZE.glob("components/*/*.yaml")})

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is missing")

Manifest = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> list[Manifest]:
    command = ["kubectl", "kustomize", str(KUSTOMIZE / "overlays" / overlay)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return list(yaml.safe_load_all(shown.stdout))


def of(manifests: list[Manifest], kind: str, name: str = "") -> list[Manifest]:
    return [
        one
        for one in manifests
        if one["kind"] == kind and (not name or one["metadata"]["name"] == name)
    ]


def read_all() -> list[Manifest]:
    texts = [path.read_text() for path in FILES]
    return [one for text in texts for one in yaml.safe_load_all(text)]


def check(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] not in OTHERS | {"Kustomization", "Component"}:
            kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_all_manifests_are_valid():
    check(read_all())


def test_an_unknown_field_is_noticed():
    (wrong,) = of(read_all(), "Deployment", "roost-router")
    wrong["spec"]["template"]["spec"]["restartPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        check([wrong])


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
class TestRendered:
    def test_they_are_valid_and_of_one_namespace(self, overlay):
        manifests = rendered(overlay)
        check(manifests)
        for one in manifests:
            if one["kind"] != "Namespace":
                assert one["metadata"]["namespace"] == "roost", one["metadata"]["name"]

    def test_pods_take_no_right_that_the_strictest_profile_forbids(self, overlay):
        for deployment in of(rendered(overlay), "Deployment"):
            pod = deployment["spec"]["template"]["spec"]
            security = pod["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert container["resources"]["limits"]["memory"]
                assert ":" in container["image"]

    def test_only_routers_may_ask_the_api_and_only_for_endpoint_slices(self, overlay):
        for deployment in of(rendered(overlay), "Deployment"):
            pod = deployment["spec"]["template"]["spec"]
            is_router = deployment["metadata"]["name"] == "roost-router"
            assert pod.get("automountServiceAccountToken", True) is is_router
        (role,) = of(rendered(overlay), "Role")
        assert role["rules"] == [
            {
                "apiGroups": ["discovery.k8s.io"],
                "resources": ["endpointslices"],
                "verbs": ["get", "list", "watch"],
            }
        ]
        assert not of(rendered(overlay), "ClusterRole")

    def test_routers_are_probed_on_the_admin_port_and_have_time_to_drain(self, overlay):
        pod, container, line = parts(overlay, "roost-router")
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"http": line.number("--port"), "admin": line.number("--admin-port")}
        paths = {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
        for probe, path in paths.items():
            assert container[probe]["httpGet"] == {"path": path, "port": "admin"}
        drain_s = line.number("--drain-delay") + line.number("--drain")
        assert drain_s + 5 <= pod["terminationGracePeriodSeconds"]
        ready = container["readinessProbe"]
        notices_s = ready["periodSeconds"] * ready["failureThreshold"]
        assert overlay == "dev" or notices_s < line.number("--drain-delay")

    def test_engines_have_time_to_finish(self, overlay):
        pod, container, line = parts(overlay, "roost-engine")
        assert container["ports"][0]["containerPort"] == line.number("--port")
        waits_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert waits_s + line.number("--grace") + 5 <= pod["terminationGracePeriodSeconds"]

    def test_routers_look_for_the_engines_service(self, overlay):
        _, _, line = parts(overlay, "roost-router")
        (service,) = of(rendered(overlay), "Service", "roost-engine")
        assert service["spec"]["clusterIP"] == "None"
        port = service["spec"]["ports"][0]["port"]
        assert line.options["--replicas-kubernetes"] == [f"roost/roost-engine:{port}"]

    def test_everybody_is_cut_off_but_who_is_named(self, overlay):
        policies = {
            one["metadata"]["name"]: one["spec"] for one in of(rendered(overlay), "NetworkPolicy")
        }
        assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        engines = policies["roost-engine"]
        assert "egress" not in engines
        assert all(rule["from"] for rule in engines["ingress"])
        open_ports = [
            port["port"]
            for policy in policies.values()
            for rule in policy.get("ingress", [])
            if "from" not in rule
            for port in rule["ports"]
        ]
        assert open_ports == [8000]

    def test_selectors_find_their_pods(self, overlay):
        pods = [
            d["spec"]["template"]["metadata"]["labels"] for d in of(rendered(overlay), "Deployment")
        ]
        wanted = [s["spec"]["selector"] for s in of(rendered(overlay), "Service")]
        for kind in ("PodDisruptionBudget", "PodMonitor"):
            wanted += [
                one["spec"]["selector"]["matchLabels"] for one in of(rendered(overlay), kind)
            ]
        for selector in wanted:
            assert any(selector.items() <= labels.items() for labels in pods), selector

    def test_pods_get_the_secrets_that_their_options_name_and_no_other(self, overlay):
        for deployment in of(rendered(overlay), "Deployment"):
            pod = deployment["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            mounts = {one["name"]: one["mountPath"] for one in container.get("volumeMounts", [])}
            assert set(mounts) == {volume["name"] for volume in pod.get("volumes", [])}
            given = {
                f"{mounts[volume['name']]}/{item['path']}"
                for volume in pod.get("volumes", [])
                if volume.get("secret", {}).get("secretName") == "roost-secrets"
                for item in volume["secret"]["items"]
            }
            parts = [argument.rpartition("=")[2] for argument in container["args"]]
            assert given == {part for part in parts if part.startswith("/run/secrets/")}


def parts(overlay: str, name: str) -> tuple[Manifest, Manifest, CommandLine]:
    (deployment,) = of(rendered(overlay), "Deployment", name)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container, CommandLine(container["args"])


@needs_kubectl
def test_several_routers_share_a_redis_are_spread_and_never_all_away():
    (deployment,) = of(rendered("ha"), "Deployment", "roost-router")
    assert deployment["spec"]["replicas"] == 3
    _, _, line = parts("ha", "roost-router")
    (redis,) = of(rendered("ha"), "Service", "roost-redis")
    host = redis["metadata"]["name"]
    assert line.options["--redis"] == f"redis://roost@{host}:{redis['spec']['ports'][0]['port']}/0"
    assert {"--redis-password-file", "--redis-secret-file"} <= set(line.options)
    for name in ("roost-router", "roost-engine"):
        (budget,) = of(rendered("ha"), "PodDisruptionBudget", name)
        assert budget["spec"]["maxUnavailable"] == 1
        spread = parts("ha", name)[0]["topologySpreadConstraints"]
        assert {one["topologyKey"] for one in spread} == {
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        }
    policies = {one["metadata"]["name"]: one["spec"] for one in of(rendered("ha"), "NetworkPolicy")}
    to_redis = [r for r in policies["roost-router"]["egress"] if r["ports"] == [{"port": 6379}]]
    assert len(to_redis) == 1
    assert [rule["ports"] for rule in policies["roost-redis"]["ingress"]] == [[{"port": 6379}]]


@needs_kubectl
def test_what_engines_are_scaled_by_is_exported():
    (scaled,) = of(rendered("ha"), "ScaledObject")
    (engine,) = of(rendered("ha"), "Deployment", "roost-engine")
    assert scaled["spec"]["scaleTargetRef"]["name"] == engine["metadata"]["name"]
    assert "replicas" not in engine["spec"]  # the autoscaler's
    assert scaled["spec"]["minReplicaCount"] >= 2
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    assert "roost_backlog_seconds" in queries[0]
    for trigger, query in zip(scaled["spec"]["triggers"], queries, strict=True):
        assert complaints(query) == []
        assert float(trigger["metadata"]["threshold"]) > 0
        assert trigger["metricType"] == "Value"  # means already


@needs_kubectl
def test_monitors_scrape_ports_that_pods_name_and_the_jobs_that_alerts_go_by():
    for name, port in (("roost-router", "admin"), ("roost-engine", "http")):
        (monitor,) = of(rendered("ha"), "PodMonitor", name)
        _, container, _ = parts("ha", name)
        assert [one["port"] for one in monitor["spec"]["podMetricsEndpoints"]] == [port]
        assert port in {one["name"] for one in container["ports"]}
        (deployment,) = of(rendered("ha"), "Deployment", name)
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert labels[monitor["spec"]["jobLabel"]] == name


@needs_kubectl
def test_one_gpu_is_asked_for_and_used():
    _, container, line = parts("single-gpu", "roost-engine")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert line.options["--device"] == "cuda"
    assert not of(rendered("single-gpu"), "PodDisruptionBudget", "roost-engine")
