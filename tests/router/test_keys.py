"""API keys: made, hashed, looked up; what a file of them may hold."""

from __future__ import annotations

import re
from contextlib import suppress
from hashlib import sha256

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from roost.cli import main
from roost_router.keys import KEY_BYTES, KeyFileError, KeyRing, make_key, parse_keys


def stored(key: str, name: str = "") -> str:
    return f"sha256:{sha256(key.encode()).hexdigest()} {name}".rstrip()


def test_a_key_opens_what_its_hash_was_written_for():
    key, line = make_key(bytes(range(KEY_BYTES)))
    ring = parse_keys(f"# keys\n\n{line} alice\n{stored('sk-other', 'bob')}\n")

    assert len(ring) == 2
    assert ring.owner(b"Bearer " + key.encode()) == "alice"
    assert ring.owner(b"bearer  " + key.encode() + b" ") == "alice"
    assert ring.owner(b"Bearer sk-other") == "bob"


def test_a_key_has_256_random_bits_in_letters_that_need_no_quoting():
    key, line = make_key(b"\xff" * KEY_BYTES)

    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key)
    assert line == stored(key)
    with pytest.raises(ValueError, match="32 random bytes"):
        make_key(b"short")


@pytest.mark.parametrize(
    "value",
    [
        None, b"", b"Bearer", b"Bearer ", b"sk-a", b"Basic sk-a", b"Bearer sk-A", b"Bearer sk-a.",
        b"Bearer sk-a sk-a", b"Bearer\tsk-a", b"Bearer " + sha256(b"sk-a").hexdigest().encode(),
        b"Bearer \xff\xfe", b"Bearer " + b"a" * 1_000_000,
    ],
)  # fmt: skip
def test_anything_else_opens_nothing(value):
    assert parse_keys(stored("sk-a")).owner(value) is None


def test_the_longest_header_that_is_looked_at():
    for length, owner in ((505, "a"), (506, None)):
        key = "k" * length
        assert parse_keys(stored(key, "a")).owner(b"Bearer " + key.encode()) == owner


def test_digests_that_begin_alike_are_told_apart():
    """The part by which a digest is found does not decide."""
    digest = sha256(b"sk-a").digest()
    other = digest[:-1] + bytes([digest[-1] ^ 1])

    assert KeyRing({other: "other", digest: "a"}).owner(b"Bearer sk-a") == "a"
    assert KeyRing({other: "other"}).owner(b"Bearer sk-a") is None


def test_a_key_without_a_name_is_called_by_its_hash():
    line = stored("sk-a")

    assert parse_keys(line).owner(b"Bearer sk-a") == f"key-{line[7:15]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no key"),
        ("# nothing\n\n", "no key"),
        ("sk-plaintext-secret", "line 1"),
        (stored("a") + "\n" + stored("a"), "line 2 repeats"),
        (stored("a").upper(), "line 1"),
        (stored("a", "two names"), "line 1"),
        (stored("a")[:-1], "line 1"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_line_and_its_content_not_shown(text, message):
    with pytest.raises(KeyFileError, match=message) as raised:
        parse_keys(text)

    assert "secret" not in str(raised.value)


@given(st.text())
def test_no_text_breaks_the_reader(text):
    with suppress(KeyFileError):
        assert len(parse_keys(text)) > 0


@given(st.binary(max_size=600))
def test_no_header_breaks_the_lookup(value):
    assert parse_keys(stored("sk-a")).owner(value) is None


def test_the_command_prints_a_key_and_the_line_for_the_file():
    shown = CliRunner().invoke(main, ["keys", "new", "--name", "alice"]).output.splitlines()

    assert len(shown) == 2
    assert parse_keys(shown[1]).owner(b"Bearer " + shown[0].encode()) == "alice"


@pytest.mark.parametrize("name", ["two words", "a\x1bb", " "])
def test_a_name_that_would_not_be_read_back_is_refused(name):
    assert CliRunner().invoke(main, ["keys", "new", "--name", name]).exit_code != 0
