"""`roost register`: says in the store that replicas are here, while they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from roost.cli_parts import needing_redis, redis_options

if TYPE_CHECKING:
    from roost_router.store.sharing import Cluster


@click.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@redis_options
@click.option(
    "--life",
    "life_s",
    type=click.FloatRange(5.0, 3600.0),
    default=10.0,
    help="Seconds that a replica counts that is told of no more, for it does not answer.",
)
@click.option("--lifeline-fd", type=int, hidden=True)
def register(
    urls: tuple[str, ...],
    redis_url: str,
    redis_secret_file: Path,
    redis_password_file: Path | None,
    redis_ca_file: Path | None,
    life_s: float,
    lifeline_fd: int | None,
) -> None:
    """Tell routers with --replicas-redis that replicas are here, at the URLs that routers reach.

    Runs beside them, of any make; takes them back when it ends.

    Example: roost register http://10.0.0.7:8101 --redis redis://store --redis-secret-file secret
    """
    with needing_redis("`roost register`"):
        from roost_router.store.sharing import open_cluster
    import uvloop

    from roost_router.config import ConfigError
    from roost_router.replica_url import ReplicaUrlError, check_replica_url, url_key

    try:
        for url in urls:
            check_replica_url(url)
        if len(set(map(url_key, urls))) != len(urls):
            raise click.ClickException("a replica is given twice")
        cluster = open_cluster(redis_url, redis_secret_file, redis_password_file, redis_ca_file)
    except (ConfigError, ReplicaUrlError) as error:
        raise click.ClickException(str(error)) from None
    uvloop.run(_register(cluster, urls, life_s, lifeline_fd))


async def _register(
    cluster: Cluster, urls: tuple[str, ...], life_s: float, lifeline_fd: int | None
) -> None:
    """Until SIGTERM, SIGINT, or the lifeline's end."""
    import asyncio
    import contextlib
    import signal

    from roost_router.discovery.registrar import Registrar
    from roost_router.store.members import Members

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline_fd is not None:  # nothing is ever written: readable means closed
        loop.add_reader(lifeline_fd, stop.set)
    registrar = Registrar(Members(*cluster), urls, life_s)
    await cluster.store.start()
    running = asyncio.create_task(registrar.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if running.done():
            running.result()
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await registrar.leave()
        await cluster.store.close()
