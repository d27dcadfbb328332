"""What the router knows of its replicas: state, load, speed. Pure."""
