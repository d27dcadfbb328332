-- KEYS: <prefix>quota:   ARGV: for each bucket its name, its limit a minute, what was spent
-- Replies their levels, as text.
--
--   <prefix>quota:<name>   STRING "<level> <microseconds since 1970>", there until it would be full
--
-- A bucket holds a minute's worth and is filled as fast as its limit says; debts make its level negative.

local call = redis.call
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local levels = {}
for at = 1, #ARGV, 3 do
  local key, limit, spent = KEYS[1] .. ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local level, since = limit, now
  local known = call('GET', key)
  if known then
    local a, b = string.match(known, '^(%S+) (%d+)$')
    if a and tonumber(a) then level, since = tonumber(a), tonumber(b) end
  end
  level = math.min(limit, level + math.max(0, now - since) / 60e6 * limit) - spent
  if spent ~= 0 then
    local full_ms = math.ceil((limit - level) / limit * 60000) + 1000
    local text = string.format('%.6f %.0f', level, math.max(now, since))
    call('SET', key, text, 'PX', string.format('%.0f', math.max(1000, full_ms)))
  end
  levels[#levels + 1] = string.format('%.6f', level)
end
return levels
