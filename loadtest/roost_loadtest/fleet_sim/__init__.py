"""Fleet simulator: the real router before simulated replicas, in virtual time.

    trace.py ──► events.py ──► routers.py     who decides: the real Placer, or the bound
    load.py          │
       told.py ──────┴───────► replica.py ──► cache.py, model.py     in closed form, or
       prompts.py              engine_replica.py                     the real engine's scheduler
    sweep.py: every policy at every load      summary.py: figures and tables

What is real. `roost_router.placement.Placer` with its prefix index, fleet, fitted speeds and
policy: the very objects of the data path, called at the same moments with a clock of our own.
They see what a router sees (their own placements, first tokens, cached tokens, ends, and KV events
if asked for), never the simulated replicas.

What is modelled. Replicas (model.py for a step's time, replica.py for what a step holds, cache.py
for the memory): continuous batching with chunked prefill, first come first served, mixed steps,
one memory for running requests and cached prompts, least recently used blocks evicted first.
The formulas are the usual ones of such simulators: prefill linear in its tokens plus the pairs of
query and key, decode bound by reading weights and keys. That traces stand for prompts as ids of
blocks is the format of Mooncake's traces (FAST'25), and hits are counted in such blocks.

Or the engine's real scheduler and block pool, stepped in the same virtual time
(engine_replica.py, which says where the two differ). On the same trace both come to the same within
a few per cent, so that the quick one is the default.

Replicas may be unlike in speed and memory, and routers may begin with speeds that are wrong
(sweep.FleetConfig).

What the closed form leaves out:
- Answers take no place in the cache once they have ended.
- No preemption: a request gets the memory for its whole answer at once.
- Two requests of one step may share a block that is computed in it, as in vLLM; an engine that
  waits for the first to finish starts the second a step later.

What both leave out:
- No prompt goes on from an answer: a trace does not say which blocks it became.
- Replicas refuse no request, and do not fail or restart.
- Time on the network and in the router is none. Speeds have no noise, and do not change.
- Requests are never aborted, and nobody retries.
- A router knows its own placements at once. `hears_after_s` delays what replicas tell, with the
  true times, as a report that was long under way.
- Without KV events (told.py) routers count by themselves and learn from answers (rung 1). Load
  reports are polled, `poll_interval_s` apart.

Reading results. `hits` is the share of prompt tokens that replicas found cached. `load` is defined
in load.py: 1.0 is what the fleet could carry if every replica hit as one cache does that sees all
requests. `busy` is no measure of load: one stream keeps a replica busy. The bound is a fleet whose
replicas share one cache and whose router sees their queues: what no router can reach, as it moves
blocks in no time, but the gap to it says what is left to gain. A trace starts on empty caches, and
all requests count.

Not here: replay over HTTP, engines that compute, failures (`simulation/` has those).
"""
