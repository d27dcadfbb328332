-- ARGV: most buckets, most blocks to look at (the bucket that passes it is the last), seconds to live
-- Goes on where the last call ended. Replies OK, the next bucket, buckets seen, blocks seen, blocks removed, numbers
-- that are free again, keys removed that were no buckets; or EMPTY for no index.

local most_buckets, left, ttl_s = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local known = call('HMGET', TABLE, 'gen', 'dead', 'going')
if not known[1] then return {'EMPTY'} end
local buckets, cursor, dead = BUCKETS .. known[1], number_in('cursor'), known[2] or ''
local going = known[3] or ''       -- of the dead those that were it when this round began
local is_clean = is_empty(dead)
call('EXPIRE', TABLE, 2 * ttl_s)   -- first: after a write that needs no memory a full server takes all others
local seen, blocks, removed, freed, strange = 0, 0, 0, 0, 0

local cleaned = {}                 -- values that were met: the same without the dead, '' for nobody
local function clean(field, value)
  if #field ~= 6 then return '' end
  local after = cleaned[value]
  if not after then
    after = is_value(value) and pack_value(byte(value) % 16, without(unpack_mask(value), dead)) or ''
    cleaned[value] = after
  end
  return after
end

local function sweep(key)
  local fields = call('HGETALL', key)
  local changed, gone = {}, {}
  for at = 1, #fields, 2 do
    local after = clean(fields[at], fields[at + 1])
    if after == '' then
      gone[#gone + 1] = fields[at]
    elseif after ~= fields[at + 1] then
      changed[#changed + 1] = fields[at]
      changed[#changed + 1] = after
    end
  end
  if #changed > 0 then call('HSET', key, unpack(changed)) end
  if #gone > 0 then call('HDEL', key, unpack(gone)) end
  removed = removed + #gone
  left = left - #fields / 2
end

while seen < most_buckets and left > 0 and cursor < NUM_BUCKETS do
  local key = buckets .. char(floor(cursor / 256), cursor % 256)
  local size = pcall_redis('HLEN', key)
  if type(size) == 'table' or size > MAX_FIELDS then
    call('UNLINK', key)
    strange = strange + 1
  elseif size > 0 then
    blocks = blocks + size
    if not is_clean then sweep(key) end
    call('EXPIRE', key, ttl_s)
  end
  cursor, seen = cursor + 1, seen + 1
end

if cursor >= NUM_BUCKETS then
  cursor = 0
  for number = 0, #going * 8 - 1 do
    if has_bit(going, number) then freed = freed + 1 end
  end
  dead = without(dead, going)
  -- Holders that nobody has written to or opened for a lifetime belong to replicas that are no more.
  local now = tonumber(call('TIME')[1])
  local live = call('HGET', TABLE, 'live') or ''
  local is_changed = false
  call('HSET', TABLE, 'dead', dead)
  for number = 0, #live * 8 - 1 do
    if has_bit(live, number) and number_in('s' .. number) + ttl_s < now then
      retire(number, read_record(number))
      is_changed = true
    end
  end
  if is_changed then next_version() end
  call('HSET', TABLE, 'going', call('HGET', TABLE, 'dead'))
end
call('HSET', TABLE, 'cursor', cursor)
return {'OK', cursor, seen, blocks, removed, freed, strange}
