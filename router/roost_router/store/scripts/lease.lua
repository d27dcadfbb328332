-- KEYS: <prefix>leases   ARGV: router, milliseconds that it is alive without another beat, seconds to live, replicas
-- Replies for each replica the fence with which this router is its feeder, as text; '0' where another one is.
--
--   <prefix>leases            HASH, replica -> "<fence> <router>"
--   <prefix>router:<router>   STRING, there while the router is alive
--
-- A lease is its owner's while the owner is alive: one key renews all of them.

local call = redis.call
local LEASES, router = KEYS[1], ARGV[1]
local ROUTERS = string.sub(LEASES, 1, -7) .. 'router:'

call('SET', ROUTERS .. router, '1', 'PX', ARGV[2])
local time = call('TIME')
local now = time[1] * 1000000 + time[2]

local alive = {[router] = true}
local function is_alive(owner)
  if alive[owner] == nil then alive[owner] = call('EXISTS', ROUTERS .. owner) == 1 end
  return alive[owner]
end

-- Leases of replicas that nobody names any more: those are many only where replicas come and go.
if call('HLEN', LEASES) > 4 * #ARGV + 64 then
  local all, gone = call('HGETALL', LEASES), {}
  for at = 1, #all, 2 do
    local owner = string.match(all[at + 1], '^%d+ (.*)$')
    if #gone < 1000 and not (owner and is_alive(owner)) then gone[#gone + 1] = all[at] end
  end
  if #gone > 0 then call('HDEL', LEASES, unpack(gone)) end
end

local fences = {}
for at = 4, #ARGV do
  local replica = ARGV[at]
  local lease = call('HGET', LEASES, replica)
  local fence, owner
  if lease then fence, owner = string.match(lease, '^(%d+) (.*)$') end
  if owner == router then
    fences[#fences + 1] = fence
  elseif owner and is_alive(owner) then
    fences[#fences + 1] = '0'
  else
    -- Greater than all before, in a table that was lost, too.
    local next_fence = math.max(now, tonumber(fence or 0) + 1)
    local text = string.format('%.0f', next_fence)
    call('HSET', LEASES, replica, text .. ' ' .. router)
    fences[#fences + 1] = text
  end
end
if #ARGV >= 4 then call('EXPIRE', LEASES, ARGV[3]) end
return fences
