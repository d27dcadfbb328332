"""For all tests."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. Threads of torch that wait for each other spin, and where other
    # workers have the cores meanwhile, they take minutes of them for what one does in seconds.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
