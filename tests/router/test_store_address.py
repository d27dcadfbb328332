"""What --redis takes."""

from __future__ import annotations

import pytest

from roost_router.store.address import AddressError, Mode, Node, StoreAddress, parse_address


@pytest.mark.parametrize(
    ("url", "mode", "nodes", "rest"),
    [
        ("redis://h", Mode.SINGLE, [("h", 6379)], {}),
        ("redis://h/", Mode.SINGLE, [("h", 6379)], {}),
        ("redis://h:1/15", Mode.SINGLE, [("h", 1)], {"db": 15}),
        ("redis://[::1]:65535", Mode.SINGLE, [("::1", 65535)], {}),
        ("rediss://h.example", Mode.SINGLE, [("h.example", 6379)], {"tls": True}),
        (
            "redis://u:p%40w:x@h",
            Mode.SINGLE,
            [("h", 6379)],
            {"user": "u", "password": "p@w:x"},
        ),
        ("redis://:pw@h", Mode.SINGLE, [("h", 6379)], {"user": "default", "password": "pw"}),
        ("redis://u:a@b@h", Mode.SINGLE, [("h", 6379)], {"user": "u", "password": "a@b"}),
        ("unix:///a/b.sock", Mode.UNIX, [("/a/b.sock", 0)], {}),
        ("unix://u:p@/a", Mode.UNIX, [("/a", 0)], {"user": "u", "password": "p"}),
        (
            "redis+sentinel://a:1,[::2],c/roost",
            Mode.SENTINEL,
            [("a", 1), ("::2", 26379), ("c", 26379)],
            {"service": "roost"},
        ),
        (
            "rediss+sentinel://u:p@a/s%2F1/3",
            Mode.SENTINEL,
            [("a", 26379)],
            {"service": "s/1", "db": 3, "tls": True, "user": "u", "password": "p"},
        ),
        ("redis+cluster://a,b:7", Mode.CLUSTER, [("a", 6379), ("b", 7)], {}),
        ("rediss+cluster://a/", Mode.CLUSTER, [("a", 6379)], {"tls": True}),
    ],
)
def test_each_form_is_read(url, mode, nodes, rest):
    expected = StoreAddress(mode=mode, nodes=tuple(Node(*node) for node in nodes), **rest)

    assert parse_address(url) == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "--redis takes redis://host:6379"),
        ("h:6379", "--redis takes"),
        ("http://h", "--redis takes"),
        ("redis://", "--redis takes"),
        ("rediss+unix:///a", "--redis takes"),
        ("redis://h:0", "'h:0' in --redis is no host"),
        ("redis://h:65536", "is no host"),
        ("redis://h:x", "is no host"),
        ("redis://a,b", "several hosts are for"),
        ("redis://a,,b", "is no host"),
        ("redis://h/x", "'x' in --redis is no number of a database"),
        ("redis://h/1/2", "'1/2' in --redis is no number"),
        ("redis://h?db=1", "no blanks, queries"),
        ("redis://h /1", "no blanks"),
        ("redis://@h", "neither user nor password"),
        ("redis://u@h", "names the user u without a password"),
        ("unix://relative", "is no path"),
        ("unix:///", "is no path"),
        ("redis+sentinel://a", "name the service: redis+sentinel://a/service"),
        ("redis+sentinel://a/", "name the service"),
        ("redis+cluster://a/1", "a cluster has one database"),
    ],
)
def test_what_is_none_of_them_is_refused_by_name(url, words):
    with pytest.raises(AddressError) as caught:
        parse_address(url)

    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("redis://:a@h", {"password": "b"}, "given twice"),
        ("redis://h", {"ca_file": "ca.pem"}, "write rediss://"),
        ("rediss://h", {"cert_file": "c.pem"}, "given together"),
        ("rediss://h", {"key_file": "k.pem"}, "given together"),
    ],
)
def test_options_that_contradict_each_other_are_refused(url, options, words):
    with pytest.raises(AddressError, match=words):
        parse_address(url, **options)


def test_options_complete_the_url():
    address = parse_address(
        "rediss://roost@h", password="pw", ca_file="a", cert_file="b", key_file="c"
    )

    assert (address.user, address.password) == ("roost", "pw")
    assert (address.ca_file, address.cert_file, address.key_file) == ("a", "b", "c")
    assert parse_address("redis://h", password="pw").user == "default"


@pytest.mark.parametrize(
    "place", ["redis://{}h:6379/2", "rediss+sentinel://{}a:1,[::1]:2/s/3", "unix://{}/a",
              "redis+cluster://{}a:1,b:2"]
)  # fmt: skip
def test_what_is_shown_is_the_url_without_its_password(place):
    address = parse_address(place.format("me:canary@"))

    assert str(address) == place.format("")
    assert "canary" not in repr(address)
    assert "canary" not in f"{[address]}"


@pytest.mark.parametrize(
    "url", ["redis://u:canary@h:x", "redis://u:canary@a,b", "redis:/u:canary@h",
            "redis+sentinel://u:canary@h", "redis://u:canary@h?x", "unix://u:canary@x"]
)  # fmt: skip
def test_no_error_shows_a_password(url):
    with pytest.raises(AddressError) as caught:
        parse_address(url)

    assert "canary" not in str(caught.value)
