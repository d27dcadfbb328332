"""Where the cache is: text chains and the prefix index. Pure."""
