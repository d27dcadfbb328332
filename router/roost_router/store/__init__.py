"""What routers of one fleet keep in Redis. Nothing here is imported unless --redis is given."""
