"""Benchmark: time to first token of a long prompt, cold and warm, through a router.

Interleaved: each round sends a prompt nobody has seen, then the same prompt with another
question. The ratio is the median of the rounds' ratios, so a slow machine slows both sides.
"""

from __future__ import annotations

from statistics import median

import aiohttp

from roost_loadtest.client import stream_chat
from roost_loadtest.prompts import conversation


async def bench_ttft(base_url: str, model: str, *, rounds: int, num_tokens: int) -> float:
    """Print one line a round and the medians; returns the median ratio cold / warm.

    Raises StreamError if a request fails.
    """
    cold: list[float] = []
    warm: list[float] = []
    print(f"{'round':>5} {'replica':>8} {'prompt':>7} {'cached':>7} {'cold s':>8} {'warm s':>8}")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        for number in range(rounds):
            name = f"house number {number}"
            messages = conversation(name, "Who may enter?", num_tokens)
            first = await stream_chat(session, base_url, model, messages, max_tokens=2)
            messages = conversation(name, "When does it close?", num_tokens)
            second = await stream_chat(session, base_url, model, messages, max_tokens=2)
            cold.append(first.ttft_s)
            warm.append(second.ttft_s)
            print(
                f"{number:>5} {second.replica or '-':>8} {second.prompt_tokens:>7} "
                f"{second.cached_tokens:>7} {first.ttft_s:>8.3f} {second.ttft_s:>8.3f}"
            )
    ratio = median(c / w for c, w in zip(cold, warm, strict=True))
    print(f"median cold {median(cold):.3f} s, warm {median(warm):.3f} s, cold/warm {ratio:.1f}")
    return ratio
