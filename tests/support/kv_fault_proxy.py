"""Stands between a router and an engine, and empties batches of KV events on the way.

What an engine answers passes; only where its events are published is another address, of a socket
that repeats them. An emptied batch keeps its number, epoch and digests: nothing but the digests can
tell that its events are missing. Replays are asked of the engine itself.
"""

from __future__ import annotations

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import msgspec
import zmq

_SOURCES = "/kv_event_sources"


class KvFaultProxy:
    """Before one engine, on a free port; to be closed."""

    def __init__(self, engine_url: str) -> None:
        self._engine = urlsplit(engine_url)
        self.num_emptied = 0
        self._num_to_empty = 0
        status, _, body = self.ask("GET", _SOURCES, {}, b"")
        assert status == 200
        (self._source,) = json.loads(body)
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.connect(self._source["endpoint"])
        self._sub.subscribe(self._source["topic"])
        self._pub = self._context.socket(zmq.PUB)
        self._pub.bind("tcp://127.0.0.1:*")
        self._source["endpoint"] = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self._is_closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._threads = [
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}),
            threading.Thread(target=self._repeat),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def empty_next(self) -> None:
        """Empty the next batch that has any events."""
        self._num_to_empty += 1

    def close(self) -> None:
        self._is_closing.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()
        self._context.destroy(linger=0)

    def _repeat(self) -> None:
        while not self._is_closing.is_set():
            if not self._sub.poll(50):
                continue
            topic, sequence, payload = self._sub.recv_multipart()
            if self._num_to_empty:
                batch = msgspec.msgpack.decode(payload)
                *events, state = batch[1]
                if events:
                    batch[1] = [state]
                    payload = msgspec.msgpack.encode(batch)
                    self._num_to_empty -= 1
                    self.num_emptied += 1
            self._pub.send_multipart([topic, sequence, payload])

    def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the engine answers, all of it."""
        connection = http.client.HTTPConnection(self._engine.hostname, self._engine.port)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == _SOURCES:
                    self._send(200, [], json.dumps([proxy._source]).encode())
                else:
                    self._pass_on()

            def do_POST(self) -> None:
                self._pass_on()

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                self._send(*proxy.ask(self.command, self.path, dict(self.headers), body))

            def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                        self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler
