"""Suites of others against the router: openai-python's tests, schemathesis, slowhttptest.

    sdk     the API tests in openai-python's source distribution: chat, completions, models
    schema  schemathesis on OpenAI's own specification, cut to the paths that we serve
    slow    slowhttptest's four attacks, while a client asks ten times a second

Each runs against a router process before a replica with complete canned answers. What a suite
needs is installed into an environment of its own inside `folder`, never into ours, and nothing
of it is kept in the repository. OpenAI's specification is not on a package index: it is given
as a file (github.com/openai/openai-openapi, openapi.json).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from roost_loadtest.edge_replica import MODELS
from roost_loadtest.local_processes import allow_open_files, free_port

_SDK_TESTS = ("chat/test_completions.py", "test_completions.py", "test_models.py")
#: What only OpenAI serves: stored completions, deletion of models.
_NOT_SERVED = "not stored and not delete and not (chat and (retrieve or update or list))"
_SDK_NEEDS = (
    *("pytest", "pytest-asyncio", "pytest-xdist", "respx", "dirty-equals", "inline-snapshot"),
    *("nest_asyncio", "rich", "httpx-aiohttp", "time-machine", "trio", "cryptography"),
)
_SERVED = {
    "/chat/completions": "post",
    "/completions": "post",
    "/models": "get",
    "/models/{model}": "get",
}
#: The others ask for more than the specification keeps: it has no content type for a stream.
_CHECKS = "not_a_server_error"
#: slowhttptest's attacks: slow head, slow body, ranges, slow reading of the answer.
_ATTACKS: dict[str, list[str]] = {
    "H": ["-H", "-i", "5"],
    "B": ["-B", "-i", "5", "-s", "8192"],
    "R": ["-R", "-a", "10", "-b", "3000"],
    "X": ["-X", "-w", "512", "-y", "1024", "-n", "5", "-z", "32", "-k", "3"],
}
_PROBE_GAP_S = 0.1


class EdgeError(Exception):
    """A suite cannot run; one line that says what to do."""


def run_sdk(folder: Path) -> bool:
    """openai-python's tests at the installed version; whether all passed."""
    release = version("openai")
    python = _environment(folder, [*_SDK_NEEDS, f"openai=={release}"])
    source = folder / f"openai-{release}"
    if not source.is_dir():
        pip = [
            str(python),
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "openai",
        ]
        _run([*pip, "--dest", str(folder), f"openai=={release}"])
        with tarfile.open(folder / f"openai-{release}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    tests = [f"tests/api_resources/{name}" for name in _SDK_TESTS]
    options = ["-n0", "-q", "-W", "default", "-p", "no:cacheprovider", "-k", _NOT_SERVED]
    with _router() as url:
        environment = {**os.environ, "TEST_API_BASE_URL": f"{url}/v1"}  # noqa: TID251
        done = subprocess.run(
            [str(python), "-m", "pytest", *options, *tests],
            cwd=source,
            env=environment,
            check=False,
        )
    return done.returncode == 0


def run_schema(folder: Path, spec: Path, seconds: int) -> bool:
    """Schemathesis for so long; whether no request led to a server error."""
    python = _environment(folder, ["schemathesis"])
    cut = folder.resolve() / "spec.json"
    cut.write_bytes(msgspec.json.encode(cut_spec(msgspec.json.decode(spec.read_bytes()))))
    with _router() as url:
        command = [str(python.parent / "st"), "run", str(cut), "--url", f"{url}/v1"]
        command += ["--max-time", str(seconds), "--phases", "examples,coverage,fuzzing"]
        command += ["-c", _CHECKS, "--continue-on-failure", "-n", "1000", "--workers", "1"]
        return subprocess.run(command, cwd=folder, check=False).returncode == 0


def run_slow(folder: Path, connections: int, seconds: int) -> bool:
    """The four attacks one after the other; whether the service was available throughout."""
    if shutil.which("slowhttptest") is None:
        raise EdgeError(
            "slowhttptest is missing: install it (Debian, Ubuntu: apt install slowhttptest)"
        )
    needed = 2 * connections + 256
    if allow_open_files(needed) < needed:
        raise EdgeError(f"{connections} connections need {needed} open files: raise `ulimit -n`")
    ok = True
    with _router() as url:
        for name, options in _ATTACKS.items():
            command = ["slowhttptest", *options, "-c", str(connections), "-r", "200"]
            command += ["-l", str(seconds), "-p", "5", "-t", "POST" if name == "B" else "GET"]
            command += ["-u", f"{url}/v1/{'completions' if name == 'B' else 'models'}"]
            with _Probe(url) as probe:
                done = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, check=False
                )
            said = re.findall(r"service available:\W[^YN]*(YES|NO)", done.stdout)
            failed = probe.num_failed or "NO" in said or not said
            ok = ok and not failed
            print(
                f"{name}: slowhttptest saw the service {'/'.join(sorted(set(said))) or 'never'}; "
                f"{probe.num_asked} requests beside it, {probe.num_failed} failed, "
                f"slowest {probe.slowest_s * 1e3:.0f} ms"
            )
    return ok


def cut_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's specification with the paths that we serve, and what they refer to.

    A model that is not served is answered 404 before anything else is judged, so `model` is one
    that is. Keys are not asked for.
    """
    paths = {path: {method: spec["paths"][path][method]} for path, method in _SERVED.items()}
    components: dict[str, dict[str, Any]] = {}
    waiting: list[Any] = [paths]
    while waiting:
        for kind, name in set(_references(waiting.pop())):
            if name not in components.setdefault(kind, {}):
                part = components[kind][name] = spec["components"][kind][name]
                waiting.append(part)
    for schema in _objects(components):
        properties = schema.get("properties")
        if isinstance(properties, dict) and "model" in properties:
            properties["model"] = {"type": "string", "enum": [MODELS[0]]}
    for path in paths.values():
        for operation in path.values():
            operation.pop("security", None)
    return {
        "openapi": spec["openapi"],
        "info": {"title": "cut", "version": "1"},
        "paths": paths,
        "components": components,
    }


def _references(node: Any) -> Iterator[tuple[str, str]]:
    for part in _objects(node):
        target = part.get("$ref")
        if isinstance(target, str):
            _, _, kind, name = target.split("/")
            yield kind, name


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    """`node` and all that is in it, as far as it is an object."""
    if isinstance(node, dict):
        yield node
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _objects(value)


class _Probe:
    """A client that keeps asking while something else goes on."""

    def __init__(self, url: str) -> None:
        self._request = urllib.request.Request(  # noqa: S310
            f"{url}/v1/completions",
            data=msgspec.json.encode({"model": MODELS[0], "prompt": "x"}),
            headers={"content-type": "application/json"},
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.num_asked = self.num_failed = 0
        self.slowest_s = 0.0

    def __enter__(self) -> _Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(_PROBE_GAP_S):
            self.num_asked += 1
            started_at = time.monotonic()
            try:
                with urllib.request.urlopen(self._request, timeout=10) as answer:  # noqa: S310
                    answer.read()
            except OSError:
                self.num_failed += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started_at)


def _environment(folder: Path, packages: Sequence[str]) -> Path:
    """Python of the suites' own environment, with `packages`."""
    folder.mkdir(parents=True, exist_ok=True)
    python = folder.resolve() / "venv" / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(python.parent.parent)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
    return python


def _run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode:
        raise EdgeError(f"this failed: {' '.join(command)}")


@contextlib.contextmanager
def _router() -> Iterator[str]:
    """A router before one replica, as processes; its URL."""
    replica, port, admin = free_port(), free_port(), free_port()
    route = [
        sys.executable,
        "-m",
        "roost",
        "route",
        "--port",
        str(port),
        "--admin-port",
        str(admin),
    ]
    route += ["--replica", f"http://127.0.0.1:{replica}"]
    with contextlib.ExitStack() as stack:
        for command in ([sys.executable, "-m", "roost_loadtest.edge_replica", str(replica)], route):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.terminate)
        _until_ready(f"http://127.0.0.1:{admin}/ready")
        yield f"http://127.0.0.1:{port}"


def _until_ready(url: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return
        time.sleep(0.05)
    raise EdgeError("the router did not become ready")
