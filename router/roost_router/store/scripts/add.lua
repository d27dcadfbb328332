-- ARGV: number, serial, fence, seconds to live, most blocks of a bucket, depth of the first id (0 is a chain's
-- first), ids of 8 bytes, one after the other in the order of their chain
-- Replies OK, new blocks, evicted blocks, ids skipped for what lies in their bucket's place; or GONE; or FENCED, fence.

local number, ttl_s, most, depth, ids = tonumber(ARGV[1]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local refused = misshapen(ids) or refusal(ARGV[1], ARGV[2], ARGV[3])
if refused then return refused end
touch(number)   -- before all else: a server that is full refuses this, and nothing is half done
call('EXPIRE', TABLE, 2 * ttl_s)

local buckets = BUCKETS .. call('HGET', TABLE, 'gen')
local live = call('HGET', TABLE, 'live')
local added, evicted, skipped = 0, 0, 0

-- What goes first of a bucket: what is not ours, then what no living holder has, then the deepest.
local ranks = {}   -- of values that were met
local function rank(field, value)
  if #field ~= 6 then return 17 end
  local found = ranks[value]
  if not found then
    found = not is_value(value) and 17 or is_empty(both(unpack_mask(value), live)) and 16 or byte(value) % 16
    ranks[value] = found
  end
  return found
end

-- Down to seven eighths, so that the next few find room; of one rank those go first that came first.
local function evict(key, size)
  if size > MAX_FIELDS then
    call('UNLINK', key)
    evicted = evicted + size
    return
  end
  local fields = call('HGETALL', key)
  local by_rank = {}
  for at = 1, #fields, 2 do
    local place = rank(fields[at], fields[at + 1])
    local those = by_rank[place]
    if not those then those = {} by_rank[place] = those end
    those[#those + 1] = fields[at]
  end
  local surplus = #fields / 2 - (most - floor(most / 8))
  local gone = {}
  for place = 17, 0, -1 do
    for _, field in ipairs(by_rank[place] or {}) do
      if #gone >= surplus then break end
      gone[#gone + 1] = field
    end
  end
  evicted = evicted + call('HDEL', key, unpack(gone))
end

local class, next_class = 0, 2
local mine = pack_value(0, put_bit('', number, true))   -- the value of a block that only this holder has
local mine_tail, mine_header = sub(mine, 2), byte(mine)
local grown = {}                                        -- values that were met: the same with this holder
for at = 1, #ids, 8 do
  while depth + 1 >= next_class and class < 15 do
    class, next_class = class + 1, next_class * 2
    mine = char(mine_header + class) .. mine_tail
  end
  depth = depth + 1
  local key, field = buckets .. bucket_of(ids, at), sub(ids, at + 2, at + 7)
  local is_new = pcall_redis('HSETNX', key, field, mine)
  if is_new == 1 then
    added = added + 1
    local size = call('HLEN', key)
    if size == 1 then call('EXPIRE', key, ttl_s) elseif size > most then evict(key, size) end
  elseif is_new == 0 then
    local value = call('HGET', key, field)
    if value ~= mine then
      local after = grown[value]
      if not after then
        after = mine
        if is_value(value) then after = pack_value(byte(value) % 16, put_bit(unpack_mask(value), number, true)) end
        grown[value] = after
      end
      if after ~= value then call('HSET', key, field, after) end
    end
  else
    skipped = skipped + 1
  end
end
return {'OK', added, evicted, skipped}
