"""Command line: composes the router, the engine and the load tests; holds no logic."""
