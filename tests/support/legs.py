"""Streams as a router has them: legs of an answer, cut between events and continued elsewhere."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Sequence
from typing import Any

from served import Replica

from roost_wire.resume import RESUMABLE, SEED, Resume, read_comment, with_resume

Event = tuple[list[int], Any]  # tokens reported with it; its JSON, None for [DONE]


class Leg:
    """One attempt at an answer, complete."""

    def __init__(self, headers: dict[str, str], body: str) -> None:
        self.headers = headers
        self.events = [_event(block) for block in body.split("\n\n")[:-1]]
        assert body.endswith("data: [DONE]\n\n"), body

    @property
    def seed(self) -> int:
        return int(self.headers[SEED])

    def token_ids(self, num_events: int) -> list[int]:
        """What a router that has so many events was told."""
        return [token_id for ids, _ in self.events[:num_events] for token_id in ids]


def begin(replica: Replica, path: str, asked: dict[str, Any], **headers: str) -> Leg:
    """A stream that may be continued."""
    return _post(replica, path, json.dumps(asked).encode(), {RESUMABLE: "1"} | headers)


def resume(replica: Replica, path: str, asked: dict[str, Any], ids: list[int], seed: int) -> Leg:
    """The rest of a stream, after these tokens."""
    body = with_resume(json.dumps(asked).encode(), Resume(ids, seed))
    return _post(replica, path, body, {RESUMABLE: "1"})


class Said:
    """What the events of an answer say together; AssertionError if they are no answer."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.text = ""
        self.calls: dict[int, dict[str, str]] = {}
        self.logprobs: list[Any] = []
        self.end: tuple[str, Any] | None = None
        self.usage: dict[str, int] | None = None
        self.num_roles = 0
        self.token_ids: list[int] = []
        for ids, data in events:
            self.token_ids += ids
            if data is not None:
                self._add(data)

    @property
    def all(self) -> Any:
        return self.text, self.calls, self.logprobs, self.end, self.usage, self.num_roles

    def _add(self, data: dict[str, Any]) -> None:
        if data.get("usage"):
            usage = data["usage"]
            self.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        for choice in data["choices"]:
            assert self.end is None, "something follows the end"
            delta = choice.get("delta", {})
            self.num_roles += "role" in delta
            self.text += choice.get("text", "") + delta.get("content", "")
            for call in delta.get("tool_calls", []):
                self._add_call(call)
            self._add_logprobs(choice["logprobs"])
            if choice["finish_reason"] is not None:
                self.end = (choice["finish_reason"], choice["stop_reason"])

    def _add_call(self, call: dict[str, Any]) -> None:
        function = call["function"]
        if "id" in call:
            assert call["index"] not in self.calls, "a call is begun twice"
            self.calls[call["index"]] = {
                "id": call["id"],
                "name": function["name"],
                "arguments": "",
            }
        self.calls[call["index"]]["arguments"] += function["arguments"]

    def _add_logprobs(self, logprobs: Any) -> None:
        if logprobs is None:
            return
        if "content" in logprobs:
            self.logprobs += logprobs["content"]
        else:
            names = ("text_offset", "tokens", "token_logprobs", "top_logprobs")
            self.logprobs += zip(*(logprobs[name] for name in names), strict=True)


def check_every_cut(
    replicas: Sequence[Replica], path: str, asked: dict[str, Any], *, every: int = 1
) -> Said:
    """A stream of one replica, cut after every so many events and continued by the others."""
    asked = asked | {"stream": True, "stream_options": {"include_usage": True}}
    leg = begin(replicas[0], path, asked)
    whole = Said(leg.events)
    assert whole.end is not None
    assert whole.usage is not None
    assert len(whole.token_ids) == whole.usage["completion_tokens"]
    for cut in range(0, len(leg.events), every):
        if Said(leg.events[:cut]).end is not None:
            break  # nothing to continue
        ids = leg.token_ids(cut)
        other = replicas[1 + cut % (len(replicas) - 1)]
        rest = resume(other, path, asked, ids, leg.seed)
        role = leg.events[:1] if cut == 0 and whole.num_roles else []  # the router's own
        joined = Said([*role, *leg.events[:cut], *rest.events])

        assert joined.all == whole.all, f"continued after {cut} events, {len(ids)} tokens"
        assert joined.token_ids == whole.token_ids
        assert rest.headers["x-roost-prompt-tokens"] == leg.headers["x-roost-prompt-tokens"]
        assert rest.seed == leg.seed
    return whole


def _post(replica: Replica, path: str, body: bytes, headers: dict[str, str]) -> Leg:
    connection = http.client.HTTPConnection("127.0.0.1", replica.port)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, text
        return Leg({name.lower(): value for name, value in answer.getheaders()}, text)
    finally:
        connection.close()


def _event(block: str) -> Event:
    first, _, last = block.rpartition("\n")
    ids = read_comment(first.encode()) if first else []
    text = last.removeprefix("data: ")
    return ids, None if text == "[DONE]" else json.loads(text)
