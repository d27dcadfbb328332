"""How a replica is picked: one formula a file. Pure."""
