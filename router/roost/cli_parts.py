"""What the files of the command line share: kinds of options, and the error of a missing extra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., object])

PORT = click.IntRange(0, 65535)
WEIGHTS = click.Choice(["stored", "float32", "bfloat16"])
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
NEW_FILE = click.Path(path_type=Path, dir_okay=False, writable=True)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


def redis_options(command: _Command) -> _Command:
    """Where the routers' store is, for commands that are no routers."""
    for option in (
        click.option("--redis-ca-file", type=FILE, help="Certificates to trust, with rediss://."),
        click.option("--redis-password-file", type=FILE, help="Holds the password of Redis."),
        click.option(
            "--redis-secret-file", type=FILE, required=True, help="The routers' common secret."
        ),
        click.option(
            "--redis", "redis_url", required=True, metavar="URL", help="As of `roost route`."
        ),
    ):
        command = option(command)
    return command


class _Tokenizer(click.ParamType[tuple[str, Path]]):
    """MODEL=FOLDER. Models' ids may have a = themselves, folders of tokenizers hardly ever."""

    name = "model=folder"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        model, equals, folder = str(value).rpartition("=")
        if not equals or not model:
            self.fail(f"{value!r} is not MODEL=FOLDER", param, ctx)
        if not (Path(folder) / "tokenizer.json").is_file():
            self.fail(f"there is no tokenizer.json in {folder!r}", param, ctx)
        return model, Path(folder)


TOKENIZER = _Tokenizer()


@contextlib.contextmanager
def needing_engine(what: str) -> Iterator[None]:
    """Run what needs packages of the extra "engine"; say so where one is missing."""
    with _needing(what, "engine"):
        yield


@contextlib.contextmanager
def needing_redis(what: str) -> Iterator[None]:
    """Run what needs packages of the extra "redis"; say so where one is missing."""
    with _needing(what, "redis"):
        yield


@contextlib.contextmanager
def needing_dev(what: str) -> Iterator[None]:
    """Run what needs packages of the extra "dev", as real Redis servers; say so likewise."""
    with _needing(what, "dev"):
        yield


@contextlib.contextmanager
def _needing(what: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{what} needs {error.name}: pip install 'roost[{extra}]'"
        ) from None
