"""The engine: a replica with prefix-sharing paged KV and an OpenAI API."""
