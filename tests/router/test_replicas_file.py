"""Files that list replicas: what is read, and where what cannot be is."""

from __future__ import annotations

import pytest

from roost_router.discovery.replicas_file import (
    MAX_FILE_BYTES,
    ReplicasFileError,
    parse_replicas,
)
from roost_router.discovery.roster import MAX_REPLICAS

ONE = b"http://10.0.0.1:8000"


def urls(data: bytes) -> list[str]:
    return [told.url for told in parse_replicas(data)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"# nobody\n\n", []),
        (ONE, ["http://10.0.0.1:8000"]),
        (b"  " + ONE + b"\t# the first\r\n\r\nhttps://b.example/x\n", ["http://10.0.0.1:8000", "https://b.example/x"]),
        (b"\xef\xbb\xbf" + ONE, ["http://10.0.0.1:8000"]),
    ],
)  # fmt: skip
def test_lines_are_urls_and_comments(data, expected):
    assert urls(data) == expected


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"\n  ftp://x\n", "line 2, column 3: 'ftp://x' is not a replica's URL"),
        (b"# a\nhttp://169.254.169.254\n", "line 2, column 1: '169.254.169.254' can be no replica"),
        (ONE + b" " + ONE, "line 1, column 22: one URL a line"),
        (b"http://a:1#x", "line 1, column 1: give 'http://a:1#x' without"),
        (ONE + b"\n#\n" + ONE + b"/", "line 3, column 1: the same replica as in line 1"),
        (ONE + b"\n# \xff", "line 2, column 3: not UTF-8"),
        (b"http://a/v1\n", "line 1, column 1: give 'http://a/v1' without /v1"),
        (ONE + b"\0", "line 1, column 1: 'http://10.0.0.1:8000\\x00' is not a replica's URL"),
    ],
)
def test_a_line_that_cannot_be_used_is_told_with_its_place(data, where):
    with pytest.raises(ReplicasFileError) as raised:
        parse_replicas(data)

    assert str(raised.value).startswith(where)


def test_so_many_replicas_are_the_limit():
    lines = [b"http://h%d:80\n" % number for number in range(MAX_REPLICAS + 1)]

    assert len(urls(b"".join(lines[:-1]))) == MAX_REPLICAS
    with pytest.raises(ReplicasFileError, match="lists 1,025 replicas; at most 1,024"):
        parse_replicas(b"".join(lines))


def test_so_many_bytes_are_the_limit():
    assert urls(ONE + b"\n" + b"#" * (MAX_FILE_BYTES - len(ONE) - 1)) == ["http://10.0.0.1:8000"]
    with pytest.raises(ReplicasFileError, match="larger than 1,048,576 bytes"):
        parse_replicas(ONE + b"\n" + b"#" * (MAX_FILE_BYTES - len(ONE)))
