"""Trace replay over HTTP: real routers before mock or real engines, in scaled time.

    prompts.py ──► client.py ──► a router (routers.py) ──► mock_engines.py ──► paced.py
    run.py: every router on every trace, interleaved        figures.py: figures and tables
    real_engines.py: the same before engines that compute

What is real: the routers with their whole data path, as processes, started as their users start
them; HTTP, streams, connections. What is modelled: the engines' time and memory, by the same
objects as `roost sim` uses (fleet_sim/), under the wall clock times a speed-up.

A speed-up shortens what the engines do and how far requests are apart. It does not shorten what
routers do: their own delays count times the speed-up, and so do their time constants (how long a
request is held, how long a stream may be silent). The lower the speed-up, the truer the run and
the longer it takes. Two things are set right for all: acknowledgements are never delayed (a router
that leaves Nagle's algorithm on would wait 40 ms of the wall, times the speed-up, see client.py),
and ours polls its replicas once a second of the simulation.

A run is marked where it says nothing: the client or a mock was late, or routers, mocks and client
together needed more of the machine than leaves each its own. See figures.py for the bounds.
"""
