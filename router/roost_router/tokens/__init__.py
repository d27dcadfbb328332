"""Tokens of prompts, off the path: worker processes that render and encode."""
