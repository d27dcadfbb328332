"""What routers tell each other of what they do, so that several act as one. Pure."""
