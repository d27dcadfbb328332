"""Redis: how it is reached, what runs inside it, what is kept there."""
