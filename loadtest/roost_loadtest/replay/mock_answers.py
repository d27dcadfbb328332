"""What a mock engine says: vLLM's words, an event a token. Pure."""

from __future__ import annotations

import msgspec

from roost_loadtest.replay.prompts import MODEL, TOKEN_BYTES
from roost_wire import vllm_metrics as names
from roost_wire.load_report import LoadReport

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-replay","object":"chat.completion.chunk","created":1,'
    b'"model":"%b","choices":[%%b]%%b}\n\n'
) % MODEL.encode()
_CHOICE = b'{"index":0,"delta":{%b},"finish_reason":%b}'
_FIRST = _EVENT % (_CHOICE % (b'"role":"assistant","content":""', b"null"), b"")
_TOKEN = _EVENT % (_CHOICE % (b'"content":" a"', b"null"), b"")
_STOP = _EVENT % (_CHOICE % (b"", b'"length"'), b"")
_USAGE = (
    b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
    b'"prompt_tokens_details":{"cached_tokens":%d}}'
)
MODELS_PAGE = b'{"object":"list","data":[{"id":"%b","object":"model","owned_by":"vllm"}]}' % (
    MODEL.encode()
)


class _Message(msgspec.Struct):
    content: str = ""


class Body(msgspec.Struct):
    """A chat request, as far as a mock cares."""

    messages: list[_Message]
    max_tokens: int = 16
    max_completion_tokens: int | None = None
    stream: bool = False

    @property
    def prompt(self) -> bytes:
        """What its blocks are made of."""
        return "\n".join(message.content for message in self.messages).encode()

    @property
    def num_output(self) -> int:
        """Tokens of the answer: as many as it may have."""
        return max(1, self.max_completion_tokens or self.max_tokens)


body_decoder = msgspec.json.Decoder(Body)


def tokens(num_tokens: int) -> bytes:
    """The next tokens of a stream."""
    return _chunk(_TOKEN * num_tokens)


def stream_end(num_tokens: int, prompt: int, output: int, cached: int) -> bytes:
    """The last `num_tokens` tokens and all that ends a stream."""
    usage = _EVENT % (b"", _USAGE % (prompt, output, prompt + output, cached))
    return _chunk(_TOKEN * num_tokens + _STOP + usage + b"data: [DONE]\n\n") + b"0\r\n\r\n"


def whole(prompt: int, output: int, cached: int) -> bytes:
    """A completion that is not streamed."""
    usage = _USAGE % (prompt, output, prompt + output, cached)
    return page(
        b'{"id":"chatcmpl-replay","object":"chat.completion","created":1,"model":"%b","choices":'
        b'[{"index":0,"message":{"role":"assistant","content":"%b"},"finish_reason":"length"}]%b}'
        % (MODEL.encode(), b" a" * output, usage)
    )


def page(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    """A whole answer."""
    head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    return head % (status, kind, len(body)) + body


def refusal(status: bytes, message: str) -> bytes:
    """An error in OpenAI's shape."""
    return page(msgspec.json.encode({"error": {"message": message}}), status)


def metrics_page(report: LoadReport, block_tokens: int) -> bytes:
    """What vLLM's page says of load and memory."""
    assert report.kv_capacity_tokens is not None
    num_blocks = report.kv_capacity_tokens // block_tokens
    lines = [
        f"{names.NUM_REQUESTS_RUNNING} {report.num_running}",
        f"{names.NUM_REQUESTS_WAITING} {report.num_waiting}",
        f"{names.KV_CACHE_USAGE} {report.kv_usage}",
        f'{names.CACHE_CONFIG_INFO}{{block_size="{block_tokens}",num_gpu_blocks="{num_blocks}"}} 1',
    ]
    return page("\n".join([*lines, ""]).encode(), kind=b"text/plain")


def token_ids(prompt: bytes) -> bytes:
    """The prompt's tokens, as vLLM's render answers: four bytes are one. O(bytes)."""
    padded = prompt + b" " * (-len(prompt) % TOKEN_BYTES)
    return page(b'{"token_ids":%b}' % msgspec.json.encode(memoryview(padded).cast("I").tolist()))


def _chunk(events: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(events), events)


#: What a stream begins with.
FIRST_TOKEN = _chunk(_FIRST + _TOKEN)
