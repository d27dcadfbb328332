# ruff: noqa: E501, ISC004 - seeds are read best as they are sent
"""What is fuzzed: one function of bytes for each parser of what others send, with seeds.

A target returns for input it takes and for input it refuses as it should; anything else that it
raises is a defect. tests/fuzz/fuzz.py runs them for a time, test_targets.py briefly in `make test`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any, NamedTuple

import msgspec

# With coverage where fuzz.py has loaded atheris, so that tests do not pay for it.
_atheris = sys.modules.get("atheris")
_OURS = ["roost_router", "roost_wire", "roost_engine"]
with (
    _atheris.instrument_imports(include=_OURS) if _atheris is not None else contextlib.nullcontext()
):
    from roost_engine.api_errors import ApiError
    from roost_engine.chat import ChatTemplate, ChatTemplateError
    from roost_engine.loader.errors import ModelFileError
    from roost_engine.loader.gguf import GgufFile
    from roost_engine.loader.safetensors import read_safetensors
    from roost_engine.openai_api import parse_chat, parse_completion
    from roost_router.answer.events import Emitted, EventReader, split_events
    from roost_router.answer.resume import (
        CannotResumeError,
        exact_body,
        read_asked,
        text_body,
    )
    from roost_router.answer.usage import read_usage
    from roost_router.config import RouterConfig
    from roost_router.errors import BadRequestError
    from roost_router.http.downstream import Downstream
    from roost_router.http.serving import Request
    from roost_router.http.upstream import Upstream, UpstreamPool
    from roost_router.keys import KeyFileError, parse_keys
    from roost_router.openai_request import CHAT_PATH, COMPLETIONS_PATH, read_routing_fields
    from roost_router.replica_url import ReplicaUrlError, check_replica_url
    from roost_wire.load_report import parse_load_report
    from roost_wire.resume import read_comment
    from roost_wire.told_load import read_header, read_packed

CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"n":1}'
TEXT = b'{"model":"m","prompt":[1,2,3],"max_tokens":5,"stop":["a"],"logit_bias":{"1":2}}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"
EVENT = b': roost 1 2\ndata: {"id":"x","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


class Target(NamedTuple):
    run: Callable[[bytes], None]
    seeds: list[bytes]


class _Peer:
    """A service, transport, pool and listener that takes all and answers at once."""

    limits = RouterConfig(replicas=("http://127.0.0.1:1",))
    max_body_bytes = 4096
    is_draining = False

    def __init__(self) -> None:
        self.is_open = True
        self.num_ends = 0
        self.client: Downstream | None = None

    def opened(self, client: Downstream, address: object) -> None:
        self.client = client

    def answer(self, client: Downstream, request: Request) -> _Peer:
        assert len(request.body) <= self.max_body_bytes
        self.keep_alive = request.keep_alive
        return self

    def start(self) -> None:
        assert self.client is not None
        self.client.finish(keep_alive=self.keep_alive)

    def on_end(self) -> None:
        self.num_ends += 1

    def on_lost(self, reason: str) -> None:
        self.num_ends += 1

    def on_answer(self, head: object, body: bytes) -> None:
        self.num_ends += 1

    def close(self) -> None:
        self.is_open = False

    abort = close

    def is_closing(self) -> bool:
        return not self.is_open

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _in_pieces(data: bytes) -> list[bytes]:
    """The first byte says where the rest is cut."""
    size = data[0] + 1 if data else 1
    return [data[at : at + size] for at in range(1, len(data), size)]


def request(data: bytes) -> None:
    """A client's bytes, heads and bodies."""
    peer = _Peer()
    client = Downstream(peer)
    client.connection_made(peer)
    for piece in _in_pieces(data):
        if peer.is_open:
            client.data_received(piece)
    client.check(1e9)
    client.connection_lost(None)


_pool: Any = None


def answer(data: bytes) -> None:
    """A replica's bytes: exactly one end is told, whatever they are."""
    global _pool  # noqa: PLW0603
    if _pool is None:
        _pool = UpstreamPool("http://127.0.0.1:1", None, 1.0)
    peer = _Peer()
    upstream = Upstream(_pool)
    upstream.connection_made(peer)
    upstream.send(peer, [b"x"])
    for piece in _in_pieces(data):
        if peer.is_open:
            upstream.data_received(piece)
    upstream.connection_lost(None)
    assert peer.num_ends == 1


def events(data: bytes) -> None:
    """A stream of completion chunks; however it is cut, it must say and pass on the same.

    Not where three line ends follow each other, or CR LF and LF are mixed: such events may be
    taken apart in two ways. No replica writes them; they must only break nothing.
    """
    is_usual = b"\n\n\n" not in data and b"\r" not in data
    emitted = Emitted(), Emitted()
    cut, whole = (EventReader(each, reports_ids=True) for each in emitted)
    relayed = b"".join(cut.feed(piece) for piece in _in_pieces(data)) + cut.end()
    at_once = whole.feed(data[1:]) + whole.end()
    if is_usual:
        assert vars(emitted[0]) == vars(emitted[1])
        assert _events(relayed) == _events(at_once)


def _events(relayed: bytes) -> list[bytes]:
    return [event.strip(b"\r\n") for event in split_events(relayed) if event.strip(b"\r\n")]


def body(data: bytes) -> None:
    """A request's body: routing fields, canonical prompt, and what resuming makes of it."""
    for path in (CHAT_PATH, COMPLETIONS_PATH):
        with contextlib.suppress(BadRequestError):
            read_routing_fields(path, data)
    try:
        is_object = isinstance(msgspec.json.decode(data), dict)
    except ValueError:
        return  # a replica would have answered 400, and nothing is resumed
    if is_object:
        emitted = Emitted()
        EventReader(emitted, reports_ids=True).feed(EVENT)
        msgspec.json.decode(exact_body(data, emitted, 7))
        with contextlib.suppress(CannotResumeError):
            msgspec.json.decode(text_body(read_asked(data), emitted))


def api(data: bytes) -> None:
    """A request's body as the engine judges it."""
    for parse in (parse_chat, parse_completion):
        with contextlib.suppress(ApiError):
            parse(data)


def report(data: bytes) -> None:
    """A replica's metrics, load, usage and comments."""
    parse_load_report(data.decode("utf-8", "replace"))
    read_header(data)
    read_packed(data)
    read_usage(data)
    with contextlib.suppress(ValueError):
        read_comment(b": roost " + data)


def settings(data: bytes) -> None:
    """A file of keys, and a replica's URL."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(KeyFileError):
        parse_keys(text).owner(data)
    with contextlib.suppress(ReplicaUrlError):
        check_replica_url(text)


_folder = Path(tempfile.mkdtemp(prefix="roost-fuzz-"))


def gguf(data: bytes) -> None:
    """A GGUF file: all tensors are read."""
    path = _folder / "model.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ModelFileError):
        file = GgufFile(path)
        for name in file.tensors:
            file.read(name)


def safetensors(data: bytes) -> None:
    """A safetensors file: all tensors are read."""
    path = _folder / "model.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(ModelFileError):
        read_safetensors(path, ignored_suffix=".bias")


def template(data: bytes) -> None:
    """A chat template out of a model file. Its loops are bounded by the sandbox."""
    with contextlib.suppress(ChatTemplateError):
        made = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"})
        made.render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}])


def _gguf_seed() -> bytes:
    def text(value: bytes) -> bytes:
        return pack("<Q", len(value)) + value

    metadata = text(b"general.architecture") + pack("<I", 8) + text(b"llama")
    metadata += text(b"a.list") + pack("<IIQ", 9, 4, 2) + pack("<II", 1, 2)
    tensor = text(b"w") + pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = pack("<4sIQQ", b"GGUF", 3, 1, 2) + metadata + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


def _safetensors_seed() -> bytes:
    header = b'{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    return pack("<Q", len(header)) + header + bytes(16)


TARGETS = {
    "request": Target(
        request,
        [
            b"\xff" + POST % len(TEXT) + TEXT,
            b"\x05" + (POST % len(CHAT) + CHAT) * 2,
            b"\x20" + POST.replace(b"content-length: %d", b"transfer-encoding: chunked")
            + b"5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n",
            b"\xffGET http://a/v1/models HTTP/1.0\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        ],
    ),
    "answer": Target(
        answer,
        [
            b"\xffHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
            b"\x07HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhello",
            b"\x30HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ],
    ),
    "events": Target(
        events,
        [
            b"\xff" + EVENT * 2 + b"data: [DONE]\n\n",
            b'\x03data: {"choices":[{"index":0,"text":"a","finish_reason":"stop"}],"usage":null}\r\n\r\n',
            b'\xffdata: {"error":{"message":"x"}}\n\n: ping\n\n',
        ],
    ),
    "body": Target(body, [CHAT, TEXT]),
    "api": Target(api, [CHAT, TEXT]),
    "report": Target(
        report,
        [
            b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1\nvllm:x{a="b"} 1e3\n',
            b'{"usage":{"prompt_tokens":1,"prompt_tokens_details":{"cached_tokens":1}}}',
            b"1 2 3",
        ],
    ),
    "settings": Target(
        settings, [b"sha256:" + b"a" * 64 + b" name\n# x\n", b"http://169.254.169.254:80/v1"]
    ),
    "gguf": Target(gguf, [_gguf_seed()]),
    "safetensors": Target(safetensors, [_safetensors_seed()]),
    "template": Target(
        template,
        [
            b"{% for m in messages %}{{ m['role'] }}: {{ m.content | tojson }}{% endfor %}",
            b"{% if messages[0].role == 'system' %}{{ bos_token }}{% else %}"
            b"{% set ns = namespace(a=1) %}{{ ns.a }}{% generation %}x{% endgeneration %}{% endif %}",
        ],
    ),
}  # fmt: skip
