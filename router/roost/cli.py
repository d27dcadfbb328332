"""The `roost` command: parses options, then hands over to the package that does the work."""

from __future__ import annotations

import logging
import sys

import click

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="roost")
@click.option("--verbose", is_flag=True, help="Log more.")
def main(verbose: bool) -> None:
    """KV-aware LLM request router, with its own engine."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if not verbose:
        logging.getLogger("asyncio").setLevel(logging.WARNING)


@main.command()
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    required=True,
    metavar="URL",
    help="Base URL of a replica, without /v1. Repeat for each.",
)
@click.option("--host", default="127.0.0.1", help="Data port's address.")
@click.option("--port", default=8000, help="Data port: clients come here.")
@click.option("--admin-host", default="127.0.0.1", help="Admin port's address.")
@click.option("--admin-port", default=9000, help="Admin port: metrics, health, replicas.")
@click.option("--poll-interval", default=1.0, help="Seconds between looks at a replica.")
@click.option("--drain", default=10.0, help="Seconds that streams may finish after SIGTERM.")
@click.option("--lifeline-fd", type=int, hidden=True)
def route(
    replicas: tuple[str, ...],
    host: str,
    port: int,
    admin_host: str,
    admin_port: int,
    poll_interval: float,
    drain: float,
    lifeline_fd: int | None,
) -> None:
    """Route requests to OpenAI-compatible replicas.

    Example: roost route --replica http://127.0.0.1:8101 --replica http://127.0.0.1:8102
    """
    import uvloop

    from roost_router.app import run_router
    from roost_router.config import ConfigError, RouterConfig

    try:
        config = RouterConfig(
            replicas=replicas,
            host=host,
            port=port,
            admin_host=admin_host,
            admin_port=admin_port,
            poll_interval_s=poll_interval,
            drain_s=drain,
            lifeline_fd=lifeline_fd,
        )
        uvloop.run(run_router(config))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
