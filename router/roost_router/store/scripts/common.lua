-- Put before every script of the index: where things lie, and what a block's value says.
-- scripts.py joins the files; what they read and write is drawn there.

local call, pcall_redis = redis.call, redis.pcall
local byte, char, sub, rep = string.byte, string.char, string.sub, string.rep
local floor = math.floor

local TABLE = KEYS[1]                       -- <prefix>holders
local BUCKETS = sub(TABLE, 1, -8) .. 'b:'   -- <prefix>b:, then the generation, then a bucket's number
local NUM_BUCKETS = 32768
local MAX_HOLDERS = 504                     -- a mask of 63 bytes: with its header what a packed hash takes
local MAX_FIELDS = 1000                     -- whatever has more is no bucket of ours

-- The key of an id's bucket is `buckets .. bucket_of(ids, at)`: its first 15 bits but one, see scripts.py.
local function bucket_of(ids, at)
  local high, low = byte(ids, at, at + 1)
  return char(high % 128, low)
end

-- The refusal of ids that are not whole, before anything is written.
local function misshapen(ids)
  if #ids % 8 == 0 then return nil end
  return redis.error_reply('ids are 8 bytes each, these are ' .. #ids .. ' bytes')
end

-- A value is a header byte, 16 * skip + depth class, and a mask of holders: little-endian, without its first
-- 4 * skip bytes and without trailing bytes, all of them zero. One set has one value.

-- The mask of a value, from its byte 0.
local function unpack_mask(value)
  local header = byte(value)
  return rep('\0', (header - header % 16) / 4) .. sub(value, 2)
end

-- The value of a mask; nil where nobody is left.
local function pack_value(class, mask)
  local last = #mask
  while last > 0 and byte(mask, last) == 0 do last = last - 1 end
  if last == 0 then return nil end
  local first = 1
  while byte(mask, first) == 0 do first = first + 1 end
  local skip = floor((first - 1) / 4)   -- at most 15: the mask's last byte is its 63rd
  return char(16 * skip + class) .. sub(mask, 4 * skip + 1, last)
end

local function has_bit(mask, number)
  local at, bit_value = floor(number / 8) + 1, 2 ^ (number % 8)
  return at <= #mask and byte(mask, at) % (2 * bit_value) >= bit_value
end

-- `mask` with holder `number` in it or not.
local function put_bit(mask, number, is_in)
  if has_bit(mask, number) == is_in then return mask end
  local at, bit_value = floor(number / 8) + 1, 2 ^ (number % 8)
  mask = mask .. rep('\0', at - #mask)
  if not is_in then bit_value = -bit_value end
  return sub(mask, 1, at - 1) .. char(byte(mask, at) + bit_value) .. sub(mask, at + 1)
end

-- Whether it can be a value at all: one that names somebody, and nobody beyond the last holder.
local function is_value(value)
  if #value < 2 then return false end
  local header = byte(value)
  return (header - header % 16) / 4 + #value - 1 <= MAX_HOLDERS / 8
end

-- Of `mask` those that are not in `other`.
local function without(mask, other)
  local left = {}
  for at = 1, #mask do
    left[at] = char(bit.band(byte(mask, at), 255 - (byte(other, at) or 0)))
  end
  return table.concat(left)
end

-- Those in both.
local function both(mask, other)
  local left = {}
  for at = 1, math.min(#mask, #other) do
    left[at] = char(bit.band(byte(mask, at), byte(other, at)))
  end
  return table.concat(left)
end

local function is_empty(mask)
  return not string.find(mask, '[^%z]')
end

-- A whole number of microseconds since 1970, as text: Lua would write it with an exponent.
local function now_us()
  local time = call('TIME')
  return time[1] * 1000000 + time[2]
end

local function digits(number)
  return string.format('%.0f', number)
end

-- A whole number that lies in the table; 0 for what is none.
local function number_in(field)
  local number = tonumber(call('HGET', TABLE, field) or 0)
  if number and number >= 0 and number == floor(number) and number < 2 ^ 53 then return number end
  return 0
end

-- Whether `a` is less than `b`, both whole numbers as text of any length, without leading zeros.
local function is_less(a, b)
  return #a < #b or (#a == #b and a < b)
end

-- A holder's record: "<serial> <fence> <epoch> <tier> <replica>"; nil for no such holder.
local function read_record(number)
  local record = call('HGET', TABLE, 'r' .. number)
  if not record then return nil end
  local serial, fence, epoch, tier, replica = string.match(record, '^(%d+) (%d+) (%d+) (%a+) (.*)$')
  if not serial then return nil end
  return {serial = serial, fence = fence, epoch = epoch, tier = tier, replica = replica}
end

local function write_record(number, holder)
  call('HSET', TABLE, 'r' .. number, holder.serial .. ' ' .. holder.fence .. ' ' .. holder.epoch .. ' '
    .. holder.tier .. ' ' .. holder.replica, 's' .. number, call('TIME')[1])
end

-- From now on holder `number` is dead; its bits lie in buckets until sweep.lua has been round.
local function retire(number, holder)
  local masks = call('HMGET', TABLE, 'live', 'dead')
  call('HSET', TABLE, 'live', put_bit(masks[1] or '', number, false), 'dead', put_bit(masks[2] or '', number, true))
  call('HDEL', TABLE, 'r' .. number, 's' .. number)
  if holder then call('HDEL', TABLE, 'n' .. holder.tier .. ' ' .. holder.replica) end
end

-- A version of the table that was never before, not even in one that is lost.
local function next_version()
  local version = now_us()
  local last = number_in('at')
  if version <= last then version = last + 1 end
  call('HSET', TABLE, 'at', digits(version))
  return digits(version)
end

-- nil where (number, serial, fence) may write to the index, else the refusal to reply with.
local function refusal(number, serial, fence)
  local holder = read_record(number)
  if not holder or holder.serial ~= serial then return {'GONE'} end
  if is_less(fence, holder.fence) then return {'FENCED', holder.fence} end
  if fence ~= holder.fence then
    holder.fence = fence
    write_record(number, holder)
  end
  return nil
end

-- This holder is written for now.
local function touch(number)
  call('HSET', TABLE, 's' .. number, call('TIME')[1])
end
