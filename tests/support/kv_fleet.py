"""Engines whose KV events a router follows: how to start them, and what to ask of both."""

from __future__ import annotations

import json
import urllib.request

from processes import Process, get, make_client

from roost_loadtest.prompts import conversation

ANY = "tcp://127.0.0.1:*"
EVENTS = ("--kv-events-endpoint", ANY, "--kv-events-replay-endpoint", ANY)
SMALL = ("--kv-tokens", "2048", "--max-model-len", "2048")


def ask(where: Process, model: str, name: str, question: str, num_tokens: int = 600):
    """An answer's usage, and its headers."""
    with make_client(where.url) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=model,
            messages=conversation(name, question, num_tokens),
            max_tokens=4,
            temperature=0,
        )
    return raw.parse().usage, raw.headers


def trusts(admin: str) -> list[list[str]]:
    rows = json.loads(get(f"{admin}/fleet"))["replicas"]
    return [[stream["trust"] for stream in row["kv_streams"]] for row in rows]


def would_go(admin: str, model: str, name: str, question: str, num_tokens: int = 600) -> dict:
    """Where a request would go, and what each replica holds of it."""
    body = json.dumps({"model": model, "messages": conversation(name, question, num_tokens)})
    with urllib.request.urlopen(f"{admin}/explain", body.encode()) as answer:
        found = json.loads(answer.read())
    rows = {row["replica"]: row for row in found["candidates"]}
    return {"replica": found["replica"], "rows": rows}
