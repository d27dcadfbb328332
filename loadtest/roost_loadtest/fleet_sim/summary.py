"""What a run comes to: one row of figures, and tables of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from roost_loadtest.percentile import percentile

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.replica import Job, Replica


class Slo(msgspec.Struct, frozen=True):
    """What counts as a good answer, in seconds."""

    ttft_s: float = 2.0
    itl_s: float = 0.1


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one trace at one load. Times in seconds, shares from 0 to 1."""

    trace: str
    load: float
    policy: str
    requests: int
    hit_rate: float  # cached of all prompt tokens
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    #: Between a request's tokens, its mean; of these over requests:
    itl_mean_s: float
    itl_p50_s: float
    itl_p99_s: float
    e2e_mean_s: float
    balance: float  # prompt tokens computed: the replica with the most, by the mean
    busy: float  # share of the run in which a replica computes, mean
    goodput: float  # share of the requests within the SLO
    virtual_s: float  # from the first arrival to the last token


def summarise(
    jobs: Sequence[Job],
    replicas: Sequence[Replica],
    *,
    trace: str,
    load: float,
    policy: str,
    slo: Slo,
) -> Row:
    """The row of a run that has ended. O(requests · log)."""
    ttfts = [job.first_token_s - job.arrived_s for job in jobs]
    itls = [
        (job.ended_s - job.first_token_s) / max(1, job.request.output_tokens - 1) for job in jobs
    ]
    good = sum(
        ttft <= slo.ttft_s and itl <= slo.itl_s for ttft, itl in zip(ttfts, itls, strict=True)
    )
    ordered = sorted(ttfts)
    computed = [replica.computed_tokens for replica in replicas]
    virtual_s = max(job.ended_s for job in jobs) - jobs[0].arrived_s
    streams = sum(job.request.output_tokens > 1 for job in jobs)
    of_streams = sorted(
        itl for itl, job in zip(itls, jobs, strict=True) if job.request.output_tokens > 1
    ) or [0.0]
    return Row(
        trace=trace,
        load=load,
        policy=policy,
        requests=len(jobs),
        hit_rate=sum(j.cached_tokens for j in jobs) / sum(j.request.prompt_tokens for j in jobs),
        ttft_mean_s=sum(ttfts) / len(jobs),
        ttft_p50_s=percentile(ordered, 0.5),
        ttft_p90_s=percentile(ordered, 0.9),
        ttft_p99_s=percentile(ordered, 0.99),
        itl_mean_s=sum(itls) / max(1, streams),
        itl_p50_s=percentile(of_streams, 0.5),
        itl_p99_s=percentile(of_streams, 0.99),
        e2e_mean_s=sum(job.ended_s - job.arrived_s for job in jobs) / len(jobs),
        balance=max(computed) * len(computed) / sum(computed),
        busy=sum(replica.busy_s for replica in replicas) / len(replicas) / virtual_s,
        goodput=good / len(jobs),
        virtual_s=virtual_s,
    )


_HEAD = (
    f"{'policy':<24} {'hits':>6} {'ttft':>8} {'p50':>8} {'p90':>8} {'p99':>8} {'itl':>7} "
    f"{'itl p99':>7} "
    f"{'e2e':>8} {'balance':>7} {'busy':>6} {'in slo':>6}"
)


def table(rows: Sequence[Row]) -> str:
    """Rows under a heading for each trace and load; seconds, ITL in ms."""
    lines: list[str] = []
    heading = ""
    for row in rows:
        title = f"{row.trace}, load {row.load:g}, {row.requests} requests"
        if title != heading:
            heading = title
            lines += ["", title, _HEAD]
        lines.append(
            f"{row.policy:<24} {row.hit_rate:>6.1%} {row.ttft_mean_s:>8.3f} {row.ttft_p50_s:>8.3f} "
            f"{row.ttft_p90_s:>8.3f} {row.ttft_p99_s:>8.3f} {row.itl_mean_s * 1e3:>7.1f} "
            f"{row.itl_p99_s * 1e3:>7.1f} "
            f"{row.e2e_mean_s:>8.2f} {row.balance:>7.2f} {row.busy:>6.1%} {row.goodput:>6.1%}"
        )
    return "\n".join(lines[1:])
