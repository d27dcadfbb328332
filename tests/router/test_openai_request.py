"""The canonical prompt extends with the conversation and ignores how a client writes JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_router.errors import BadRequestError
from roost_router.openai_request import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    EMBEDDINGS_PATH,
    read_routing_fields,
)


def chat(messages, **fields) -> bytes:
    body = {"model": "m", "messages": messages, **fields}
    return read_routing_fields(CHAT_PATH, json.dumps(body).encode()).prompt


def completion(prompt, **fields) -> bytes:
    body = {"model": "m", "prompt": prompt, **fields}
    return read_routing_fields(COMPLETIONS_PATH, json.dumps(body).encode()).prompt


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": text})


@given(st.lists(message, max_size=5), st.lists(message, max_size=3))
def test_the_next_turn_extends_the_bytes_of_the_turn_before(turns, more):
    assert chat(turns + more).startswith(chat(turns))


def test_key_order_spacing_and_escapes_do_not_matter():
    one = b'{"model":"m","messages":[{"role":"user","content":"\\u00e9"}]}'
    two = '{ "messages": [ {"content": "é", "role": "user"} ], "model": "m", "seed": 1 }'.encode()

    left, right = (read_routing_fields(CHAT_PATH, body) for body in (one, two))
    assert (left.model, left.stream, left.prompt) == (right.model, right.stream, right.prompt)


def test_text_parts_are_their_texts_joined_by_newlines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert chat([{"role": "user", "content": parts}]) == chat([{"role": "user", "content": "a\nb"}])


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "system", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "ho"}]},
        {"model": "n"},
        {"cache_salt": "tenant"},
        {"tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "hi", "tool_calls": [1]}]},
    ],
)
def test_whatever_changes_the_prompt_changes_the_bytes(other):
    same = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

    one, two = (
        read_routing_fields(CHAT_PATH, json.dumps(body).encode()).prompt
        for body in (same, {**same, **other})
    )

    assert one != two


def test_completions_take_text_tokens_and_a_list_of_one():
    assert completion("abc") == completion(["abc"])
    assert completion([1, 2, 3]) == completion([[1, 2, 3]])
    assert completion([1, 2, 3, 4]).startswith(completion([1, 2, 3]))
    assert len({completion(p) for p in ("", "a", [97], ["a", "b"], None, 3)}) == 6


def test_stream_is_read_and_null_is_false():
    for given_value, expected in ((True, True), (False, False), (None, False)):
        body = json.dumps({"model": "m", "messages": [], "stream": given_value}).encode()
        assert read_routing_fields(CHAT_PATH, body).stream is expected


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'"\xff"', "invalid_request", None),
        (b"null", "invalid_request", None),
        (b"{}", "invalid_request", "model"),
        (b'{"model":1,"messages":[]}', "invalid_request", "model"),
        (b'{"model":"m","messages":{}}', "invalid_request", "messages"),
        (b'{"model":"m","messages":[1]}', "invalid_request", "messages[0]"),
        (b'{"model":"m","messages":[],"stream":"yes"}', "invalid_request", "stream"),
        (b'{"model":"m","messages":[],"x":' + b"[" * 10**6, "invalid_json", None),
    ],
)
def test_bad_bodies_are_named(body, code, param):
    with pytest.raises(BadRequestError) as caught:
        read_routing_fields(CHAT_PATH, body)

    assert (code, param) == (caught.value.code, caught.value.param)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail_otherwise(body):
    for path in (CHAT_PATH, COMPLETIONS_PATH):
        try:
            read_routing_fields(path, body)
        except BadRequestError:
            continue


@pytest.mark.parametrize(("one", "other"), [("a" * 300, "b" * 300), ([7] * 80, [8] * 90)])
def test_of_several_prompts_the_first_leads_and_all_count(one, other):
    alone, both = completion(one), completion([one, other])

    assert completion([one]) == alone
    assert both.startswith(alone)
    assert len(both) >= len(alone) + len(other)
    assert completion([other, one]) != both


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a b", b"a b"), (["a", "b"], b"a\x1eb"), ([1, 2], b"\x01\0\0\0\x02\0\0\0"), (["a"], b"a")],
)
def test_inputs_to_embed_are_counted_like_prompts(value, expected):
    body = json.dumps({"model": "m", "input": value, "encoding_format": "base64"}).encode()

    fields = read_routing_fields(EMBEDDINGS_PATH, body)

    assert fields.prompt == b"embed\x1fm\x1f\x1f" + expected
    assert not fields.stream
