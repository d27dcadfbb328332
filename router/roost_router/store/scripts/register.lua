-- KEYS: <prefix>members   ARGV: member, milliseconds to live, what it says (sealed)
--
--   <prefix>members   HASH, member -> "<when it expires, milliseconds since 1970> <what it says>"

local call = redis.call
call('EXPIRE', KEYS[1], 3600)   -- first: after a write that needs no memory a full server takes all others
local time = call('TIME')
local expires = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2]
call('HSET', KEYS[1], ARGV[1], string.format('%.0f ', expires) .. ARGV[3])
call('EXPIRE', KEYS[1], 3600)
return 1
