-- KEYS: <prefix>members
-- Replies member, milliseconds left, what it says; for each. Those that have expired are removed.

local call = redis.call
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local there, gone = {}, {}
local all = call('HGETALL', KEYS[1])
for at = 1, #all, 2 do
  local expires, says = string.match(all[at + 1], '^(%d+) (.*)$')
  local left = expires and tonumber(expires) - now or 0
  if left > 0 then
    there[#there + 1] = all[at]
    there[#there + 1] = left
    there[#there + 1] = says
  elseif #gone < 1000 then
    gone[#gone + 1] = all[at]
  end
end
if #gone > 0 then call('HDEL', KEYS[1], unpack(gone)) end
return there
