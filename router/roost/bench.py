"""`roost bench`: benchmarks that need processes of ours around them."""

from __future__ import annotations

import sys

from roost.cluster import Cluster, ClusterConfig
from roost_loadtest.bench_ttft import bench_ttft


async def run_bench_ttft(config: ClusterConfig, *, rounds: int, num_tokens: int) -> None:
    """Cold and warm TTFT on a cluster started for it. Raises ClusterError or StreamError."""
    async with Cluster(config, _progress) as cluster:
        await cluster.start()
        await bench_ttft(cluster.base_url, cluster.model, rounds=rounds, num_tokens=num_tokens)


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
