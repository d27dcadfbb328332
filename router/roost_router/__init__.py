"""The router: a KV-aware reverse proxy for OpenAI-compatible replicas."""
