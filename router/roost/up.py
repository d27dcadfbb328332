"""`roost up`: a local cluster for a newcomer, with a demonstration."""

from __future__ import annotations

import asyncio
import signal
import sys

from roost.cluster import Cluster, ClusterConfig, ClusterError, Progress
from roost_loadtest.client import StreamError
from roost_loadtest.demo import demonstrate
from roost_router.config import ConfigError, check_open
from roost_router.listening import bind

_QUESTION = "What is the capital of France?"
_SNIPPET = """
  base URL      {base}
  admin         {admin}  (dashboard, /fleet, /metrics)

  curl {base}/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "temperature": 0,
         "messages": [{{"role": "user", "content": "{question}"}}]}}'

  from openai import OpenAI  # pip install openai
  client = OpenAI(base_url="{base}", api_key="unused")
  answer = client.chat.completions.create(
      model="{model}",
      messages=[{{"role": "user", "content": "{question}"}}],
      temperature=0,
  )
  print(answer.choices[0].message.content)
"""


async def run_up(config: ClusterConfig, *, demo: bool, stay: bool) -> None:
    """Start a cluster, show it, and keep it until Ctrl-C.

    Raises ClusterError with one line that says what to do.
    """
    _check_ports(config)
    progress = Progress()
    cluster = Cluster(config, progress)
    serving = asyncio.create_task(_serve(cluster, progress, demo=demo, stay=stay))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        """First Ctrl-C: stop in order. Any later one: at once, but still all of it."""
        if not serving.cancelling():
            serving.cancel()
        else:
            progress("killing what is left")
            cluster.kill()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        await serving
    except asyncio.CancelledError:
        progress("stopped; no process is left behind")


async def _serve(cluster: Cluster, progress: Progress, *, demo: bool, stay: bool) -> None:
    async with cluster:
        try:
            await cluster.start()
            base, admin = cluster.base_urls[0], cluster.admin_urls[0]
            sys.stdout.write(
                _SNIPPET.format(base=base, admin=admin, model=cluster.model, question=_QUESTION)
            )
            if demo:
                await demonstrate(cluster.base_urls, cluster.model)
            if stay:
                sys.stdout.write("\nCtrl-C stops everything.\n")
                sys.stdout.flush()
                await cluster.watch()
        except asyncio.CancelledError:
            progress("stopping")
            raise
        except TimeoutError:
            raise ClusterError("the replicas took too long to start; see --verbose") from None
        except StreamError as error:
            raise ClusterError(f"the demonstration failed: {error}") from None


def _check_ports(config: ClusterConfig) -> None:
    """Refuse an open or a taken port before seconds are spent on loading a model."""
    try:
        if not config.insecure:
            check_open("--host", config.host)
        for number in range(config.num_routers):
            bind(config.host, config.port + number).close()
            bind("127.0.0.1", config.admin_port + number).close()
    except ConfigError as error:
        raise ClusterError(str(error)) from None
