-- ARGV: number, serial, fence, seconds to live, most blocks of a bucket, the depth class of each id (a byte each),
-- ids of 8 bytes; parents before their children
-- Replies OK, new blocks, evicted blocks, ids skipped for what lies in their bucket's place; or GONE; or FENCED, fence.

-- The refusal of classes that are not one for each id, or are none.
local function misclassed(classes, ids)
  if #classes * 8 == #ids and not string.find(classes, '[^%z\1-\15]') then return nil end
  return redis.error_reply('a depth class is a byte from 0 to 15 for each id')
end

local number, ttl_s, most, classes, ids = tonumber(ARGV[1]), tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], ARGV[7]
local refused = misshapen(ids) or misclassed(classes, ids) or refusal(ARGV[1], ARGV[2], ARGV[3])
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

local alone = pack_value(0, put_bit('', number, true))   -- the value of a block that only this holder has
local tail, header = sub(alone, 2), byte(alone)
local grown = {}                                        -- values that were met: the same with this holder
for at = 1, #ids, 8 do
  local mine = char(header + byte(classes, (at + 7) / 8)) .. tail
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
        if is_value(value) then
          after = pack_value(byte(value) % 16, put_bit(unpack_mask(value), number, true))
          grown[value] = after
        else
          after = mine
        end
      end
      if after ~= value then call('HSET', key, field, after) end
    end
  else
    skipped = skipped + 1
  end
end
return {'OK', added, evicted, skipped}
