"""Finds tool calls in what a model writes, piece by piece; the formats: tool_calls.py.

Arguments are shown as they come. What only looked like a call (no JSON, or a function that was
not offered) is content: nothing the model wrote is lost, white space around calls aside.

Invariant: the result does not depend on how the text is cut into pieces.

Not here: what is asked of the model (tool_calls.py), JSON of answers (responses.py).
"""

from __future__ import annotations

import re
from typing import Any, Final, Protocol

import msgspec

from roost_engine.chat_api import ToolUse
from roost_engine.tool_calls import CLOSE, OPEN, PYTHON_TAG, ToolFormat


class ToolDelta(msgspec.Struct, frozen=True):
    """A piece of a call; `name` is set on its first."""

    index: int
    name: str | None
    arguments: str


class Parsed(msgspec.Struct, frozen=True):
    """What a piece of output means: content and pieces of calls, in this order."""

    content: str = ""
    deltas: tuple[ToolDelta, ...] = ()


class ToolParser(Protocol):
    """Finds the calls in one answer, piece by piece."""

    @property
    def is_done(self) -> bool:
        """Whether as many calls have come as were wanted."""
        ...

    def push(self, piece: str) -> Parsed:
        """Take the next piece of text."""
        ...

    def flush(self) -> Parsed:
        """End of the answer."""
        ...


def tool_parser(style: ToolFormat, use: ToolUse) -> ToolParser:
    """A parser for one answer to a request with tools."""
    names = frozenset(tool.name for tool in use.tools)
    max_calls = None if use.is_parallel else 1
    if style == "llama3":
        return _Llama3Parser(names, max_calls)
    return _HermesParser(names, max_calls)


_CALL_HEAD: Final = re.compile(
    r'\s*\{\s*"name"\s*:\s*"(?P<name>[a-zA-Z0-9_-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class _Call:
    """One JSON object that may be a call, read character by character.

    `raw` is all of it; `push` returns what of its arguments is new once its head was recognised.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.raw = ""
        self.name: str | None = None  # set once the head was read
        self.are_arguments_over = False
        self._names = names
        self._at = 0  # up to where `raw` was read
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, piece: str) -> str:
        """Take a piece; return new characters of the arguments."""
        self.raw += piece
        if self.name is None:
            head = _CALL_HEAD.match(self.raw)
            if head is None or head["name"] not in self._names:
                return ""
            self.name = head["name"]
            self._at = head.end()
        start = self._at
        while self._at < len(self.raw) and not self.are_arguments_over:
            self._read(self.raw[self._at])
            self._at += 1
        return self.raw[start : self._at]

    @property
    def rest(self) -> str:
        """What follows the arguments."""
        return self.raw[self._at :]

    def whole(self) -> tuple[str, str] | None:
        """Name and arguments, if `raw` is a call with its members in another order."""
        try:
            call = msgspec.json.decode(self.raw, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            return None
        arguments = call.get("arguments", call.get("parameters"))
        if call.get("name") not in self._names or not isinstance(arguments, dict):
            return None
        return call["name"], msgspec.json.encode(arguments).decode()

    def _read(self, character: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.are_arguments_over = self._depth == 0


class _Parser:
    """What both formats share: the calls found, and the call that is being read."""

    def __init__(self, names: frozenset[str], max_calls: int | None) -> None:
        self._names = names
        self._max_calls = max_calls
        self._num_calls = 0
        self._call: _Call | None = None
        self._held = ""  # text that is not decided yet
        self._content = ""  # what this push has found
        self._deltas: list[ToolDelta] = []

    @property
    def is_done(self) -> bool:
        return self._num_calls == self._max_calls

    def push(self, piece: str) -> Parsed:
        self._held += piece
        while not self.is_done and self._step():
            pass
        return self._found()

    def _step(self) -> bool:
        """Read on in `_held`; False: more text is needed."""
        raise NotImplementedError

    def _found(self) -> Parsed:
        parsed = Parsed(self._content, tuple(self._deltas))
        self._content, self._deltas = "", []
        return parsed

    def _extend(self, call: _Call, piece: str) -> None:
        """Feed a call, and note what it says."""
        was_named = call.name is not None
        arguments = call.push(piece)
        if call.name is not None and not was_named:
            self._deltas.append(ToolDelta(self._num_calls, call.name, arguments))
        elif arguments:
            self._deltas.append(ToolDelta(self._num_calls, None, arguments))

    def _end_call(self, call: _Call, written: str) -> None:
        """A call has ended; `written` is its text with all around it."""
        self._call = None
        if call.name is None:
            whole = call.whole()
            if whole is None:
                self._content += written
                return
            self._deltas.append(ToolDelta(self._num_calls, *whole))
        self._num_calls += 1


class _HermesParser(_Parser):
    """Calls between tags; white space around calls is nobody's content."""

    def __init__(self, names: frozenset[str], max_calls: int | None) -> None:
        super().__init__(names, max_calls)
        self._gap = ""  # white space before the call that is being read

    def flush(self) -> Parsed:
        if self._call is not None:
            call = self._call
            self._extend(call, self._held)
            self._end_call(call, self._gap + OPEN + call.raw)
        elif not self.is_done and (self._held.strip() or self._num_calls == 0):
            self._content += self._held
        self._held = ""
        return self._found()

    def _step(self) -> bool:
        if self._call is None:
            before, tag, after = self._held.partition(OPEN)
            if tag:
                self._content += before.rstrip()
                self._gap = before[len(before.rstrip()) :]
                self._call, self._held = _Call(self._names), after
                return True
            keep = _num_partial(self._held, OPEN)
            cut = len(self._held[: len(self._held) - keep].rstrip())
            self._content += self._held[:cut]
            self._held = self._held[cut:]
            return False
        call = self._call
        inside, tag, after = self._held.partition(CLOSE)
        if tag:
            self._extend(call, inside)
            self._held = after
            self._end_call(call, self._gap + OPEN + call.raw + CLOSE)
            return True
        keep = _num_partial(self._held, CLOSE)
        self._extend(call, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False


class _Llama3Parser(_Parser):
    """The answer is calls from its first character on, or none at all."""

    def __init__(self, names: frozenset[str], max_calls: int | None) -> None:
        super().__init__(names, max_calls)
        self._is_text = False

    def flush(self) -> Parsed:
        call = self._call
        if call is not None:
            self._end_call(call, call.raw)
        elif not self.is_done:
            self._content += self._undecided()
        self._held = ""
        return self._found()

    def _undecided(self) -> str:
        """What is held, as content: all of it, but after a call not what parts it from the next."""
        if self._num_calls == 0:
            return self._held
        return self._held.lstrip().removeprefix(";").lstrip()

    def _step(self) -> bool:
        if self._is_text:
            self._content, self._held = self._content + self._held, ""
            return False
        if self._call is None:
            return self._begin()
        call = self._call
        self._extend(call, self._held)
        self._held = ""
        closing = call.rest.lstrip() if call.are_arguments_over else ""
        if not closing.startswith("}"):
            return False
        self._held = closing[1:]
        self._end_call(call, call.raw)
        return bool(self._held)

    def _begin(self) -> bool:
        text = self._held.lstrip().removeprefix(";").lstrip()
        text = text.removeprefix(PYTHON_TAG).lstrip()
        if not text or PYTHON_TAG.startswith(text):
            return False
        if text.startswith("{"):
            self._call, self._held = _Call(self._names), text
        else:
            self._held = self._undecided()
            self._is_text = True
        return True


def _num_partial(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`, short of all of it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
