-- KEYS: <prefix>leases   ARGV: router
-- All leases of a router are free at once. Replies whether it was alive.

return redis.call('DEL', string.sub(KEYS[1], 1, -7) .. 'router:' .. ARGV[1])
