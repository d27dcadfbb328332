"""An API server of Kubernetes as far as EndpointSlices go, over real HTTPS: list, watch, tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

NO_OPENSSL = "no openssl here to make a certificate"
_STATUSES = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 410: "Gone", 500: "Error"}


def make_certificate(folder: Path) -> bool:
    """A key and a certificate for 127.0.0.1, key.pem and ca.crt; False: there is no openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return False
    command = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=t"
    )
    files = ("-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.crt"))
    whose = ("-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run([openssl, *command.split(), *files, *whose], check=True, capture_output=True)
    return True


def endpoint_slice(name: str, *urls: str, **conditions: bool) -> dict[str, Any]:
    """A slice whose endpoints have the hosts of `urls`, and the port of the first."""
    parts = [urlsplit(url) for url in urls]
    endpoints = [
        {
            "addresses": [part.hostname],
            "conditions": {"ready": True, **conditions},
            "targetRef": {"kind": "Pod", "name": f"pod-{part.port}"},
        }
        for part in parts
    ]
    return {
        "addressType": "IPv4",
        "metadata": {"name": name},
        "endpoints": endpoints,
        "ports": [{"name": "http", "protocol": "TCP", "port": parts[0].port if parts else 80}],
    }


class KubernetesApi:
    """Serves slices; a change reaches all who watch."""

    def __init__(self, folder: Path, token: str) -> None:
        """`folder`: has key.pem and ca.crt, and is a pod's account as well."""
        self.token = token
        self.folder = folder
        self.slices: dict[str, dict[str, Any]] = {}
        self.version = 100
        self.oldest = 0  # versions before have expired
        self.fail_next: list[int] = []  # statuses of the next answers
        self.requests: list[tuple[str, dict[str, str]]] = []  # authorization, query
        self.is_polite = True  # watches end after timeoutSeconds
        self._history: list[tuple[int, bytes]] = []
        self._watchers: dict[asyncio.StreamWriter, None] = {}
        self._server: asyncio.Server | None = None
        self._port = 0
        (folder / "token").write_text(token)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    @property
    def lists(self) -> list[dict[str, str]]:
        return [query for _, query in self.requests if "watch" not in query]

    @property
    def watches(self) -> list[dict[str, str]]:
        return [query for _, query in self.requests if "watch" in query]

    async def start(self) -> KubernetesApi:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.folder / "ca.crt", self.folder / "key.pem")
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=tls)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Listen no more, and break all watches."""
        assert self._server is not None
        self._server.close()
        self.break_watches()

    def put(self, one: dict[str, Any]) -> None:
        name = one["metadata"]["name"]
        self._change("MODIFIED" if name in self.slices else "ADDED", one)
        self.slices[name] = one

    def delete(self, name: str) -> None:
        self._change("DELETED", self.slices.pop(name))

    def bookmark(self) -> None:
        self._change("BOOKMARK", {"kind": "EndpointSlice", "metadata": {}})

    def expire(self) -> None:
        """Tell all who watch that their version is too old."""
        self.oldest = self.version + 1
        self.version += 1
        status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
        self.send(json.dumps({"type": "ERROR", "object": status}).encode())

    def send(self, line: bytes) -> None:
        """Write a line into all watches, whatever it is."""
        data = line + b"\n"
        for writer in self._watchers:
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def break_watches(self) -> None:
        for writer in list(self._watchers):
            writer.transport.abort()
        self._watchers.clear()

    def _change(self, kind: str, one: dict[str, Any]) -> None:
        self.version += 1
        one["metadata"]["resourceVersion"] = str(self.version)
        line = json.dumps({"type": kind, "object": one}).encode()
        self._history.append((self.version, line))
        self.send(line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await self._answer(head, reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._watchers.pop(writer, None)
            writer.close()

    async def _answer(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        parts = urlsplit(head.split(" ")[1])
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        lines = [line.partition(": ") for line in head.split("\r\n")[1:]]
        authorization = next((v for name, _, v in lines if name.lower() == "authorization"), "")
        self.requests.append((authorization, query))
        status = self.fail_next.pop(0) if self.fail_next else 200
        if authorization != f"Bearer {self.token}":
            status = 401
        elif not parts.path.startswith("/apis/discovery.k8s.io/v1/namespaces/models/endpoint"):
            status = 404
        version = int(query.get("resourceVersion", self.version))
        if status == 200 and "watch" in query and version < self.oldest:
            status = 410
        if status != 200:
            body = json.dumps({"kind": "Status", "code": status}).encode()
            _write(writer, f"{status} {_STATUSES[status]}", body)
        elif "watch" not in query:
            metadata = {"resourceVersion": str(self.version)}
            listed = {"metadata": metadata, "items": list(self.slices.values())}
            _write(writer, "200 OK", json.dumps(listed).encode())
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for at, line in self._history:
                if at > version:
                    data = line + b"\n"
                    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            self._watchers[writer] = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    float(query["timeoutSeconds"]) if self.is_polite else 60
                ):
                    await reader.readexactly(1)  # fails when the client leaves
            self._watchers.pop(writer, None)
            writer.write(b"0\r\n\r\n")


def _write(writer: asyncio.StreamWriter, status: str, body: bytes) -> None:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(f"{head}\r\n\r\n".encode() + body)
