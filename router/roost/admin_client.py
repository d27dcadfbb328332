"""How commands ask a router's admin port: its address, its key, one page.

Over the standard library's HTTP: no proxy of the environment is used and no redirect followed, so
the key goes to the address given and nowhere else.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from roost.cli_parts import FILE

if TYPE_CHECKING:
    from roost_router.fleet_page import FleetPage

Command = TypeVar("Command", bound=Callable[..., Any])

#: A fleet of 1,024 replicas makes a page of about a megabyte.
_MAX_PAGE_BYTES = 8 << 20
_DEFAULT = "http://127.0.0.1:9000"


class NoAnswerError(click.ClickException):
    """Nobody answers at the address of an admin port."""


def asks_admin(several: str) -> Callable[[Command], Command]:
    """Options --admin and --admin-key-file. `several`: why --admin may be repeated."""

    def add(command: Command) -> Command:
        command = click.option(
            "--admin-key-file", type=FILE, help="Holds a key that the admin port asks for."
        )(command)
        return click.option(
            "--admin",
            "admins",
            multiple=True,
            default=(_DEFAULT,),
            metavar="URL",
            help=f"Admin port of the router. Repeat for each worker: {several}.",
        )(command)

    return add


def read_key(path: Path | None) -> str | None:
    """The key in a file. Raises click.ClickException."""
    if path is None:
        return None
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read a key from {path}: {error}") from None
    if not key or not key.isprintable():
        raise click.ClickException(f"{path} must hold one key, on one line")
    return key


def ask(
    admin: str, path: str, key: str | None, timeout_s: float = 10.0, *, body: bytes | None = None
) -> tuple[int, bytes]:
    """Status and body of a page. `body`: to be posted.

    Raises NoAnswerError, and click.BadParameter for an `admin` that is no address.
    """
    try:
        parts = urlsplit(admin)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.scheme != "http" or parts.path not in {"", "/"} or parts.query:
        raise click.BadParameter(
            f"{admin!r} is no admin port; one looks like {_DEFAULT}", param_hint="--admin"
        )
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(_MAX_PAGE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError(
            f"no router answers at {admin}: {error or type(error).__name__}; "
            "--admin takes the URL of its admin port"
        ) from None
    finally:
        connection.close()


def ask_fleet(admin: str, key: str | None, timeout_s: float = 10.0) -> FleetPage:
    """The page /fleet. Raises click.ClickException, NoAnswerError where it may come back."""
    import msgspec

    from roost_router.fleet_page import FleetPage

    status, page = ask(admin, "/fleet", key, timeout_s)
    check_status(admin, status, page)
    try:
        return msgspec.json.decode(page, type=FleetPage)
    except msgspec.DecodeError as error:
        raise click.ClickException(f"{admin} is not a router of this version: {error}") from None


def check_status(admin: str, status: int, page: bytes) -> None:
    """Raise click.ClickException for all but 200: what the router said, and the cure."""
    if status == 401:
        raise click.ClickException(f"{admin}: {message(page)}; give it with --admin-key-file")
    if status != 200:
        raise click.ClickException(f"{admin} answered {status}: {message(page)}")


def message(page: bytes) -> str:
    """What an error of a router says."""
    import msgspec

    try:
        return printable(str(msgspec.json.decode(page)["error"]["message"]))
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "this is not a router's admin port"


def printable(text: str) -> str:
    """Without what would move a terminal's cursor: ids and models come from others."""
    return "".join(char if char.isprintable() else "?" for char in text)
