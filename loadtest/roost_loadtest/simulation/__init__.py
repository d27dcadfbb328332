"""The router's real code in a simulated world: virtual time, no sockets, one seed one run."""
