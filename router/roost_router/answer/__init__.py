"""A request's answer: what the client has of it, and what a lost replica leads to. Pure."""
