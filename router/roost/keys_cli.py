"""`roost keys`: makes keys of clients, and publishes them to routers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from roost.cli_parts import FILE, needing_redis, redis_options

if TYPE_CHECKING:
    from roost_router.store.sharing import Cluster


@click.group()
def keys() -> None:
    """API keys of a router: only their hashes are kept."""


@keys.command("new")
@click.option("--name", default="", help="Whose key it is; logs call it so.")
def new_key(name: str) -> None:
    """Make a key: shown once, on the first line; the second line goes into the file of keys.

    Example: roost keys new --name alice | tee /dev/stderr | tail -n 1 >>keys.txt
    """
    import secrets

    from roost_router.keys import KEY_BYTES, make_key

    if name and (name.split() != [name] or not name.isprintable()):
        raise click.ClickException("a name has no spaces and no control characters")
    key, stored = make_key(secrets.token_bytes(KEY_BYTES))
    click.echo(key)
    click.echo(f"{stored} {name}".rstrip())


@keys.command("publish")
@click.argument("path", type=FILE, metavar="FILE")
@redis_options
def publish_keys(
    path: Path,
    redis_url: str,
    redis_secret_file: Path,
    redis_password_file: Path | None,
    redis_ca_file: Path | None,
) -> None:
    """Let routers with --api-keys-redis take the keys of FILE, and no others, from now on.

    They do within seconds. A key that was left out opens nothing any more.
    """
    with needing_redis("`roost keys publish`"):
        from roost_router.store.sharing import open_cluster
    import asyncio

    from roost_router.config import ConfigError
    from roost_router.keys import KeyFileError
    from roost_router.store.errors import StoreError

    try:
        cluster = open_cluster(redis_url, redis_secret_file, redis_password_file, redis_ca_file)
        num_keys = asyncio.run(_publish(cluster, path.read_text("utf-8")))
    except UnicodeDecodeError:
        raise click.ClickException(f"{path} is not a text file") from None
    except KeyFileError as error:
        raise click.ClickException(f"{path}: {error}") from None
    except (ConfigError, StoreError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"published {num_keys} keys")


async def _publish(cluster: Cluster, text: str) -> int:
    import time

    from roost_router.store.published_keys import PublishedKeys

    unix_us = time.time_ns() // 1000
    await cluster.store.start()
    try:
        return await PublishedKeys(*cluster).publish(text, unix_us)
    finally:
        await cluster.store.close()
