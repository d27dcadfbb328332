# ruff: noqa: E501, RUF001 - a case a line
"""Requests that two HTTP parsers may read differently, and what the router makes of each.

A case is what a client sends on one connection, the statuses it gets, and the bodies that reach
a replica. `bad`: refused with one 4xx or 5xx, the connection closed, nothing forwarded. `good`:
forwarded as one well-formed request. `own`: answered by the router itself. Families follow the
classes of the public lists (http-desync-guardian, llhttp's and h11's tests, http-garden's
trophies); the bytes are our own.
"""

from __future__ import annotations

from dataclasses import dataclass

BODY = b'{"model":"m","prompt":"x"}'
EVIL = b'{"model":"m","prompt":"SMUGGLED"}'
PATH = b"/v1/completions"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
SMUGGLED = POST + b"content-length: %d\r\n\r\n" % len(EVIL) + EVIL
CL = b"content-length: %d\r\n" % len(BODY)
END = b"connection: close\r\n\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
TE = b"transfer-encoding: chunked\r\n"

ANY_ERROR = 0


@dataclass(frozen=True)
class Case:
    name: str
    sent: bytes
    statuses: tuple[int, ...]  # ANY_ERROR: 4xx or 5xx
    bodies: tuple[bytes, ...]  # that reach the replica


def bad(name: str, sent: bytes) -> Case:
    """Refused; a request smuggled behind it dies with the connection."""
    return Case(name, sent + SMUGGLED, (ANY_ERROR,), ())


def good(name: str, sent: bytes, body: bytes = BODY) -> Case:
    return Case(name, sent, (200,), (body,))


def own(name: str, sent: bytes, *statuses: int) -> Case:
    return Case(name, sent, statuses, ())


def te(line: bytes) -> bytes:
    """A chunked request with this line for its Transfer-Encoding."""
    return POST + line + b"\r\n" + END + CHUNKED


def cl(line: bytes) -> bytes:
    """A request with this line for its Content-Length."""
    return POST + line + b"\r\n" + END + BODY


def chunks(body: bytes) -> bytes:
    return POST + TE + END + body


def line(first: bytes) -> bytes:
    """A request with this request line."""
    return first + b"\r\nhost: a\r\n" + CL + END + BODY


def header(text: bytes) -> bytes:
    """A request with this header line, and its end, in the middle."""
    return POST + CL + text + END + BODY


N = b"%d" % len(BODY)
HALF = len(BODY) // 2
SIZE = b"%x" % len(BODY)

FAMILIES: dict[str, list[Case]] = {
    "both lengths": [
        bad("cl then te", POST + CL + TE + b"\r\n0\r\n\r\n"),
        bad("te then cl", POST + TE + CL + b"\r\n0\r\n\r\n"),
        bad("cl 0 then te", POST + b"content-length: 0\r\n" + TE + b"\r\n0\r\n\r\n"),
        bad("te then cl 0", POST + TE + b"content-length: 0\r\n\r\n0\r\n\r\n"),
        bad("cl true for both", POST + TE + b"content-length: %d\r\n\r\n" % len(CHUNKED) + CHUNKED),
        bad("te identity and cl", POST + b"transfer-encoding: identity\r\n" + CL + b"\r\n" + BODY),
        bad("te x and cl", POST + b"transfer-encoding: x\r\n" + CL + b"\r\n" + BODY),
        bad("te empty and cl", POST + b"transfer-encoding:\r\n" + CL + b"\r\n" + BODY),
        bad("cl, te, cl", POST + CL + TE + CL + b"\r\n0\r\n\r\n"),
        bad("te, cl, te", POST + TE + CL + TE + b"\r\n0\r\n\r\n"),
        bad("TE.CL prefix", POST + TE + b"content-length: 4\r\n\r\n5c\r\n"),
        bad("nominated te and cl", POST + TE + CL + b"connection: transfer-encoding\r\n\r\n0\r\n\r\n"),
    ],
    "transfer-encoding": [
        good("chunked", te(b"transfer-encoding: chunked")),
        good("upper case", te(b"TRANSFER-ENCODING: CHUNKED")),
        good("space around", te(b"transfer-encoding: \t chunked  ")),
        bad("tab last", te(b"transfer-encoding: chunked\t")),
        good("no space", te(b"transfer-encoding:chunked")),
        bad("xchunked", te(b"transfer-encoding: xchunked")),
        bad("chunkedx", te(b"transfer-encoding: chunkedx")),
        bad("chunk", te(b"transfer-encoding: chunk")),
        bad("identity", te(b"transfer-encoding: identity")),
        bad("empty", te(b"transfer-encoding: ")),
        bad("chunked, identity", te(b"transfer-encoding: chunked, identity")),
        bad("identity, chunked", te(b"transfer-encoding: identity, chunked")),
        bad("gzip, chunked", te(b"transfer-encoding: gzip, chunked")),
        bad("chunked, gzip", te(b"transfer-encoding: chunked, gzip")),
        bad("gzip", te(b"transfer-encoding: gzip")),
        bad("chunked, chunked", te(b"transfer-encoding: chunked, chunked")),
        bad("chunked twice", te(b"transfer-encoding: chunked\r\ntransfer-encoding: chunked")),
        bad("identity line first", te(b"transfer-encoding: identity\r\ntransfer-encoding: chunked")),
        bad("identity line last", te(b"transfer-encoding: chunked\r\ntransfer-encoding: identity")),
        bad("comma first", te(b"transfer-encoding: ,chunked")),
        bad("comma last", te(b"transfer-encoding: chunked,")),
        bad("parameter", te(b"transfer-encoding: chunked;q=1")),
        bad("quoted", te(b'transfer-encoding: "chunked"')),
        bad("split word", te(b"transfer-encoding: c hunked")),
        bad("vertical tab first", te(b"transfer-encoding: \x0bchunked")),
        bad("vertical tab last", te(b"transfer-encoding: chunked\x0b")),
        bad("form feed", te(b"transfer-encoding: \x0cchunked")),
        bad("nul last", te(b"transfer-encoding: chunked\x00")),
        bad("no-break space", te(b"transfer-encoding: \xa0chunked")),
        bad("utf-8 look-alike", te("transfer-encoding: ｃhunked".encode())),
        bad("kelvin sign", te("transfer-encoding: chun\u212aed".encode())),
        bad("space before colon", te(b"transfer-encoding : chunked")),
        bad("tab before colon", te(b"transfer-encoding\t: chunked")),
        bad("nul before colon", te(b"transfer-encoding\x00: chunked")),
        bad("space before name", te(b"x: y\r\n transfer-encoding: chunked")),
        bad("tab before name", te(b"x: y\r\n\ttransfer-encoding: chunked")),
        bad("folded value", te(b"transfer-encoding:\r\n chunked")),
        bad("folded tail", te(b"transfer-encoding: chunked\r\n , identity")),
        bad("behind a bare LF", te(b"x: y\ntransfer-encoding: chunked")),
        bad("behind a bare CR", te(b"x: y\rtransfer-encoding: chunked")),
        bad("LF in the value", te(b"transfer-encoding:\n chunked")),
        bad("CR in the value", te(b"transfer-encoding: chu\rnked")),
        bad("in HTTP/1.0", te(b"transfer-encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0")),
        bad("without any body", POST + b"transfer-encoding: cow\r\n\r\n"),
        good("underscore is another header", POST + CL + b"transfer_encoding: chunked\r\n" + END + BODY),
        good("x-transfer-encoding", header(b"x-transfer-encoding: chunked\r\n")),
    ],
    "content-length": [
        good("plain", cl(b"content-length: " + N)),
        good("leading zeros", cl(b"content-length: 000" + N)),
        good("space around", cl(b"content-length: \t" + N + b" ")),
        bad("plus", cl(b"content-length: +" + N)),
        bad("minus", cl(b"content-length: -" + N)),
        bad("minus nothing", cl(b"content-length: -")),
        bad("hexadecimal", cl(b"content-length: 0x1a")),
        bad("hexadecimal digits", cl(b"content-length: 1a")),
        bad("underscore digits", cl(b"content-length: 2_6")),
        bad("fraction", cl(b"content-length: 26.0")),
        bad("exponent", cl(b"content-length: 26e0")),
        bad("word", cl(b"content-length: many")),
        bad("empty", cl(b"content-length: ")),
        bad("list of equals", cl(b"content-length: 26, 26")),
        bad("list of differents", cl(b"content-length: 26, 0")),
        bad("comma last", cl(b"content-length: 26,")),
        bad("two numbers", cl(b"content-length: 2 6")),
        bad("semicolon", cl(b"content-length: 26;a")),
        bad("quoted", cl(b'content-length: "26"')),
        bad("twice equal", cl(b"content-length: 26\r\ncontent-length: 26")),
        bad("twice different", cl(b"content-length: 26\r\ncontent-length: 0")),
        bad("twice in two cases", cl(b"content-length: 0\r\nCONTENT-LENGTH: 26")),
        bad("nul", cl(b"content-length: 26\x00")),
        bad("vertical tab", cl(b"content-length: \x0b26")),
        bad("superscript", cl(b"content-length: \xb2\xb3")),
        bad("arabic digits", cl("content-length: ٢٦".encode())),
        bad("space before colon", cl(b"content-length : 26")),
        bad("tab before colon", cl(b"content-length\t: 26")),
        bad("folded", cl(b"content-length:\r\n 26")),
        bad("folded digits", cl(b"content-length: 2\r\n 6")),
        bad("2^63", cl(b"content-length: 9223372036854775808")),
        bad("2^64", cl(b"content-length: 18446744073709551616")),
        bad("2^64 and the length", cl(b"content-length: 18446744073709551642")),
        bad("2^128", cl(b"content-length: 340282366920938463463374607431768211456")),
        bad("a thousand digits", cl(b"content-length: " + b"9" * 1000)),
        bad("five thousand digits", cl(b"content-length: " + b"1" * 5000)),
        good("underscore is another header", header(b"content_length: 0\r\n")),
        good("x-content-length", header(b"x-content-length: 0\r\n")),
        good("nominated", header(b"connection: content-length\r\n")),
    ],
    "chunks": [
        good("one", chunks(CHUNKED)),
        good("many", chunks(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n")),
        good("upper case size", chunks(b"%X\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))),
        good("zeros before size", chunks(b"000" + SIZE + b"\r\n" + BODY + b"\r\n000\r\n\r\n")),
        good("extension", chunks(SIZE + b";a=b\r\n" + BODY + b"\r\n0;c\r\n\r\n")),
        good("quoted extension", chunks(SIZE + b';a="b"\r\n' + BODY + b"\r\n0\r\n\r\n")),
        good("trailers", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx-a: b\r\nx-c: d\r\n\r\n")),
        bad("length in a trailer", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\ncontent-length: 9\r\n\r\n")),
        bad("te in a trailer", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\n" + TE + b"\r\n")),
        bad("size is no number", chunks(b"xyz\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("no size", chunks(b"\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("minus", chunks(b"-" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("plus", chunks(b"+" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("0x", chunks(b"0x" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("underscore", chunks(b"1_a\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("space before", chunks(b" " + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("space after", chunks(SIZE + b" \r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("tab after", chunks(SIZE + b"\t\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("nul after", chunks(SIZE + b"\x00\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("word after", chunks(SIZE + b" a\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("2^64", chunks(b"10000000000000000\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("2^64 and the size", chunks(b"1000000000000001a\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("LF ends the size", chunks(SIZE + b"\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("CR ends the size", chunks(SIZE + b"\r" + BODY + b"\r\n0\r\n\r\n")),
        bad("CR CR LF ends the size", chunks(SIZE + b"\r\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("LF ends the data", chunks(SIZE + b"\r\n" + BODY + b"\n0\r\n\r\n")),
        bad("CR ends the data", chunks(SIZE + b"\r\n" + BODY + b"\r0\r\n\r\n")),
        bad("nothing ends the data", chunks(SIZE + b"\r\n" + BODY + b"0\r\n\r\n")),
        bad("data longer than size", chunks(b"%x\r\n%b\r\n0\r\n\r\n" % (HALF, BODY))),
        bad("data shorter than size", chunks(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY) + 3, BODY))),
        bad("LF ends an extension", chunks(SIZE + b";a\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("LF in a quoted extension", chunks(SIZE + b';a="\n"\r\n' + BODY + b"\r\n0\r\n\r\n")),
        bad("CR LF in a quoted extension", chunks(SIZE + b';a="\r\n"\r\n' + BODY + b"\r\n0\r\n\r\n")),
        bad("CR in an extension", chunks(SIZE + b";a\rb\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("nul in an extension", chunks(SIZE + b";a\x00\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("empty extension", chunks(SIZE + b";\r\n" + BODY + b"\r\n0\r\n\r\n")),
        bad("LF ends the last size", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\n\r\n")),
        bad("LF ends the trailers", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\n\n")),
        bad("LF ends a trailer", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx: y\n\r\n")),
        bad("folded trailer", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx: y\r\n z\r\n\r\n")),
        bad("trailer without colon", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx y\r\n\r\n")),
        bad("nul in a trailer", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx: \x00\r\n\r\n")),
        bad("spaced trailer", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx : y\r\n\r\n")),
        bad("request as a trailer", chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\n" + SMUGGLED)),
    ],
    "line ends": [
        bad("LF ends the request line", (POST + CL + END).replace(b"\r\n", b"\n", 1) + BODY),
        bad("CR ends the request line", (POST + CL + END).replace(b"\r\n", b"\r", 1) + BODY),
        bad("LF everywhere", (POST + CL + END).replace(b"\r\n", b"\n") + BODY),
        bad("CR everywhere", (POST + CL + END).replace(b"\r\n", b"\r") + BODY),
        bad("LF ends a header", POST + b"x: y\n" + CL + END + BODY),
        bad("CR ends a header", POST + b"x: y\r" + CL + END + BODY),
        bad("LF ends the head", POST + CL + b"connection: close\r\n\n" + BODY),
        bad("LF LF ends the head", POST + CL + b"connection: close\n\n" + BODY),
        bad("CR CR LF ends a header", POST + b"x: y\r\r\n" + CL + END + BODY),
        bad("CR in a value", header(b"x: a\rb\r\n")),
        bad("LF in a value", header(b"x: a\nb\r\n")),
        bad("fold", header(b"x: a\r\n b\r\n")),
        bad("fold by tab", header(b"x: a\r\n\tb\r\n")),
        bad("fold of nothing", header(b"x: a\r\n \r\n")),
        bad("fold of the first header", POST.replace(b"host", b" host") + CL + END + BODY),
        bad("fold of the request line", line(PATH.join([b"POST ", b"\r\n HTTP/1.1"]))),
        good("an empty line before", b"\r\n" + POST + CL + END + BODY),
        bad("a space before", b" " + POST + CL + END + BODY),
        bad("a nul before", b"\x00" + POST + CL + END + BODY),
        bad("a byte order mark before", b"\xef\xbb\xbf" + POST + CL + END + BODY),
        bad("NEL ends a header", header("x: y\u0085z: 1\r\n".encode("latin-1")).replace(b": 1", b"\x00")),
    ],
    "request line": [
        bad("no version", line(b"POST /v1/completions")),
        bad("HTTP/0.9 get", b"GET /v1/models\r\n"),
        bad("HTTP/0.9 in words", line(b"POST /v1/completions HTTP/0.9")),
        bad("HTTP/1.2", line(b"POST /v1/completions HTTP/1.2")),
        bad("HTTP/1.10", line(b"POST /v1/completions HTTP/1.10")),
        bad("HTTP/01.1", line(b"POST /v1/completions HTTP/01.1")),
        bad("HTTP/2.0", line(b"POST /v1/completions HTTP/2.0")),
        bad("HTTP/3", line(b"POST /v1/completions HTTP/3")),
        bad("http/1.1", line(b"POST /v1/completions http/1.1")),
        bad("HTTP/1,1", line(b"POST /v1/completions HTTP/1,1")),
        bad("HTTP /1.1", line(b"POST /v1/completions HTTP /1.1")),
        bad("ICE/1.1", line(b"POST /v1/completions ICE/1.1")),
        good("RTSP/1.0 is read as HTTP/1.0", line(b"POST /v1/completions RTSP/1.0")),
        bad("space after the version", line(b"POST /v1/completions HTTP/1.1 ")),
        bad("word after the version", line(b"POST /v1/completions HTTP/1.1 x")),
        good("two spaces are read as one", line(b"POST  /v1/completions HTTP/1.1")),
        good("two spaces later", line(b"POST /v1/completions  HTTP/1.1")),
        bad("tab", line(b"POST\t/v1/completions HTTP/1.1")),
        bad("tab later", line(b"POST /v1/completions\tHTTP/1.1")),
        bad("vertical tab", line(b"POST\x0b/v1/completions HTTP/1.1")),
        bad("no target", line(b"POST HTTP/1.1")),
        bad("only a method", line(b"POST")),
        bad("lower case method", line(b"post /v1/completions HTTP/1.1")),
        bad("unknown method", line(b"FOO /v1/completions HTTP/1.1")),
        bad("nul in the method", line(b"PO\x00ST /v1/completions HTTP/1.1")),
        bad("colon in the method", line(b"POST: /v1/completions HTTP/1.1")),
        bad("long method", line(b"P" * 100_000 + b" /v1/completions HTTP/1.1")),
        bad("nul in the target", line(b"POST /v1/completions\x00 HTTP/1.1")),
        bad("space in the target", line(b"POST /v1/ completions HTTP/1.1")),
        bad("control in the target", line(b"POST /v1/completions\x01 HTTP/1.1")),
        bad("delete in the target", line(b"POST /v1/completions\x7f HTTP/1.1")),
        bad("CR in the target", line(b"POST /v1/completions\r HTTP/1.1")),
        bad("smuggling target", line(b"POST /v1/completions HTTP/1.1\nx: y HTTP/1.1")),
    ],
    "targets": [
        good("absolute", line(b"POST http://a/v1/completions HTTP/1.1")),
        good("absolute of another host", line(b"POST http://evil.example/v1/completions HTTP/1.1")),
        good("query", line(b"POST /v1/completions?a=%0d%0ax:%20y HTTP/1.1")),
        own("ftp", line(b"POST ftp://a/v1/completions HTTP/1.1"), 404),
        own("asterisk", line(b"POST * HTTP/1.1"), 404),
        own("options asterisk", b"OPTIONS * HTTP/1.1\r\nhost: a\r\n" + END, 404),
        bad("no slash", line(b"POST v1/completions HTTP/1.1")),
        own("two slashes", line(b"POST //v1/completions HTTP/1.1"), 404),
        own("slashes within", line(b"POST /v1//completions HTTP/1.1"), 404),
        own("slash at the end", line(b"POST /v1/completions/ HTTP/1.1"), 404),
        own("dots", line(b"POST /v1/x/../completions HTTP/1.1"), 404),
        own("dots out", line(b"POST /v1/completions/../../admin HTTP/1.1"), 404),
        own("encoded slash", line(b"POST /v1%2fcompletions HTTP/1.1"), 404),
        own("encoded letter", line(b"POST /v1/%63ompletions HTTP/1.1"), 404),
        own("encoded nul", line(b"POST /v1/completions%00 HTTP/1.1"), 404),
        own("encoded line end", line(b"POST /v1/completions%0d%0a HTTP/1.1"), 404),
        own("semicolon", line(b"POST /v1/completions;a HTTP/1.1"), 404),
        own("backslash", line(b"POST \\v1\\completions HTTP/1.1"), 400),
        own("other case", line(b"POST /V1/Completions HTTP/1.1"), 404),
        own("model of dots", b"GET /v1/models/..%2f..%2fetc HTTP/1.1\r\nhost: a\r\n" + END, 404),
        bad("not ascii", line("POST /v1/complétions HTTP/1.1".encode())),
        bad("authority", line(b"POST a:80 HTTP/1.1")),
    ],
    "headers": [
        bad("space before colon", header(b"x : y\r\n")),
        bad("tab before colon", header(b"x\t: y\r\n")),
        bad("no name", header(b": y\r\n")),
        bad("no colon", header(b"xyz\r\n")),
        bad("space in a name", header(b"x y: z\r\n")),
        bad("nul in a name", header(b"x\x00: y\r\n")),
        bad("control in a name", header(b"x\x01: y\r\n")),
        bad("bracket in a name", header(b"x(: y\r\n")),
        bad("slash in a name", header(b"x/y: z\r\n")),
        bad("umlaut in a name", header(b"x\xe4: y\r\n")),
        bad("delete in a name", header(b"x\x7f: y\r\n")),
        bad("quote in a name", header(b'x": y\r\n')),
        bad("nul in a value", header(b"x: a\x00b\r\n")),
        bad("control in a value", header(b"x: a\x01b\r\n")),
        bad("escape in a value", header(b"x: a\x1bb\r\n")),
        bad("delete in a value", header(b"x: a\x7fb\r\n")),
        bad("backspace in a value", header(b"x: a\x08b\r\n")),
        good("bytes above 127 in a value", header(b"x: \xc3\xa9\xff\r\n")),
        good("bytes that would be cut to CR LF", header("x: a\u010d\u010ab\r\n".encode())),
        good("encoded line end", header(b"x: a%0d%0atransfer-encoding:%20chunked\r\n")),
        good("tab in a value", header(b"x: a\tb\r\n")),
        good("empty value", header(b"x:\r\n")),
        good("colon in a value", header(b"x: y: z\r\n")),
        good("a request in a value", header(b"x: POST /v1/completions HTTP/1.1\r\n")),
        bad("no host", b"POST /v1/completions HTTP/1.1\r\n" + CL + END + BODY),
        bad("two hosts", header(b"host: b\r\n")),
        bad("two equal hosts", header(b"host: a\r\n")),
        bad("too many", header(b"x: y\r\n" * 128)),
        bad("too long", header(b"x: " + b"y" * 70_000 + b"\r\n")),
        bad("too long a name", header(b"x" * 70_000 + b": y\r\n")),
        bad("too long together", header((b"x: " + b"y" * 1000 + b"\r\n") * 100)),
        bad("too long a target", line(b"POST /v1/completions?" + b"x" * 70_000 + b" HTTP/1.1")),
    ],
    "hop by hop": [
        good("nominated host", header(b"connection: host\r\n")),
        good("nominated authorization", header(b"connection: authorization\r\nauthorization: b\r\n")),
        good("te", header(b"te: trailers, chunked\r\n")),
        good("trailer", header(b"trailer: content-length\r\n")),
        good("keep-alive", header(b"keep-alive: timeout=5\r\n")),
        good("proxy-connection", header(b"proxy-connection: keep-alive\r\n")),
        good("proxy-authorization", header(b"proxy-authorization: Basic YTpi\r\n")),
        good("expect", header(b"expect: 100-continue\r\n")),
        good("upgrade to websocket", header(b"upgrade: websocket\r\nconnection: upgrade\r\n")),
        good("upgrade to h2c", header(b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\n")),
        good("a request behind an upgrade", header(b"upgrade: x\r\nconnection: upgrade\r\n") + SMUGGLED),
        bad("upgrade with chunks", POST + TE + b"upgrade: x\r\nconnection: upgrade\r\n\r\n" + CHUNKED),
        bad("connect", b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n"),
        bad("connect with a body", b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n" + CL + b"\r\n" + BODY),
        bad("connect to a path", b"CONNECT /v1/completions HTTP/1.1\r\nhost: a\r\n" + CL + b"\r\n" + BODY),
        good("request id with spaces", header(b"x-request-id: a b\r\n")),
        good("request id too long", header(b"x-request-id: " + b"a" * 129 + b"\r\n")),
        good("a replica's header", header(b"x-roost-replica: r9\r\nx-roost-attempts: 7\r\n")),
        good("underscore names", header(b"x_a: b\r\nhost_: c\r\n_: d\r\n")),
    ],
    "methods and bodies": [
        own("get of a completion", b"GET /v1/completions HTTP/1.1\r\nhost: a\r\n" + END, 405),
        own("get with a body", b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + CL + END + BODY, 200),
        own("get with chunks", b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + TE + END + CHUNKED, 200),
        own("delete with a body", b"DELETE /v1/models HTTP/1.1\r\nhost: a\r\n" + CL + END + BODY, 405),
        own("trace", b"TRACE /v1/completions HTTP/1.1\r\nhost: a\r\n" + END, 405),
        own("put", b"PUT /v1/completions HTTP/1.1\r\nhost: a\r\n" + CL + END + BODY, 405),
        own("post of no length", POST + END, 400),
        own("a request hidden in a body", b"GET /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n"
            % len(SMUGGLED) + END + SMUGGLED, 200),
        own("compressed", header(b"content-encoding: gzip\r\n"), 415),
        own("too large", POST + b"content-length: 999999999999\r\n" + END, 413),
        own("too large in chunks", chunks(b"186a1\r\n" + b"x" * 100_001), 413),
        own("too large, 2^64 - 1", chunks(b"ffffffffffffffff\r\n" + b"x" * 100_001), 413),
    ],
    "pipelines": [
        Case("two good", POST + CL + b"\r\n" + BODY + POST + CL + END + BODY, (200, 200), (BODY, BODY)),
        Case("good then bad", POST + CL + b"\r\n" + BODY + b"G@T / HTTP/1.1\r\n\r\n" + SMUGGLED, (200,), (BODY,)),
        Case("good then cl and te", POST + CL + b"\r\n" + BODY + POST + CL + TE + b"\r\n0\r\n\r\n" + SMUGGLED,
             (200,), (BODY,)),
        Case("own then bad", b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n" + b"G@T / HTTP/1.1\r\n\r\n" + SMUGGLED,
             (200, ANY_ERROR), ()),
        Case("own then good", b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n" + POST + CL + END + BODY, (404, 200), (BODY,)),
        Case("chunks then good", POST + TE + b"\r\n" + CHUNKED + POST + CL + END + BODY, (200, 200), (BODY, BODY)),
        Case("good after close", POST + CL + END + BODY + SMUGGLED, (200,), (BODY,)),
        Case("good after HTTP/1.0", (POST + CL + b"connection: keep-alive\r\n\r\n").replace(b"/1.1", b"/1.0")
             + BODY + SMUGGLED, (200,), (BODY,)),
        Case("length shorter than body", POST + b"content-length: 0\r\n\r\n" + SMUGGLED.replace(
             b"\r\n\r\n", b"\r\n" + END), (400, 200), (EVIL,)),
        Case("junk after the body", POST + CL + b"\r\n" + BODY + b"junk\r\n\r\n" + SMUGGLED, (200,), (BODY,)),
        Case("nul after the body", POST + CL + b"\r\n" + BODY + b"\x00" + SMUGGLED, (200,), (BODY,)),
        Case("refused then good", POST + b"content-length: 99999999999\r\n\r\n" + SMUGGLED, (413,), ()),
    ],
    "other protocols": [
        bad("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
        bad("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
        bad("SSH", b"SSH-2.0-OpenSSH_9.6\r\n"),
        bad("PROXY v1", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"),
        bad("PROXY v2", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12)),
        bad("Redis", b"*1\r\n$4\r\nPING\r\n"),
        bad("memcached", b"get x\r\n"),
        bad("SMTP", b"EHLO a\r\n"),
        bad("a response", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        bad("JSON", BODY),
        bad("zeros", bytes(1000)),
        bad("0xff", b"\xff" * 1000),
        bad("FastCGI", b"\x01\x01\x00\x01\x00\x08\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00"),
    ],
}  # fmt: skip
