"""What replicas tell about their KV caches: finding it, following it, knowing how good it is."""
