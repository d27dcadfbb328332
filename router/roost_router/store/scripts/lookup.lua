-- ARGV: ids of 8 bytes in the order of their chain, most blocks to look at
-- Replies the table's version, then the runs of the chain: blocks up to its end, value; nothing for an empty index.
-- A value says who has the blocks of a run; its depth class is 0, and its mask may name dead holders.

local ids, left = ARGV[1], tonumber(ARGV[2])
local wrong = misshapen(ids)
if wrong then return wrong end
local known = call('HMGET', TABLE, 'at', 'gen')
if not known[1] then return {} end
local buckets = BUCKETS .. known[2]
local reply = {known[1]}

local plain = {}   -- values that were met: the same with depth class 0
local function look(place)
  left = left - 1
  local at = place * 8 - 7
  local high, low = byte(ids, at, at + 1)
  local value = pcall_redis('HGET', buckets .. char(high % 128, low), sub(ids, at + 2, at + 7))
  local same = plain[value]
  if not same then
    same = ''
    if type(value) == 'string' and is_value(value) then
      local header = byte(value)
      same = char(header - header % 16) .. sub(value, 2)
    end
    plain[value] = same
  end
  return same
end

local function tell(place, value)
  reply[#reply + 1] = place
  reply[#reply + 1] = value
end

-- Tells where runs end from `low` on and before `high`, whose values are known. Replicas free blocks from the
-- end of a chain: where two blocks have the same holders, so have those between.
local function walk(low, low_value, high, high_value)
  while low_value ~= high_value and low_value ~= '' do
    if high - low == 1 or left <= 0 then return tell(low, low_value) end
    local middle = floor((low + high) / 2)
    local middle_value = look(middle)
    walk(low, low_value, middle, middle_value)
    low, low_value = middle, middle_value
  end
end

local count = #ids / 8
if count == 0 then return reply end
local first = look(1)
if first == '' then return reply end
local last = first
if count > 1 then last = look(count) end
walk(1, first, count, last)
if last ~= '' then tell(count, last) end
return reply
