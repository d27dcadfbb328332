-- ARGV: number, serial, fence, seconds to live, ids of 8 bytes
-- Replies OK, ids that this holder had, ids skipped for what lies in their bucket's place; or GONE; or FENCED, fence.

local number, ids = tonumber(ARGV[1]), ARGV[5]
local refused = misshapen(ids) or refusal(ARGV[1], ARGV[2], ARGV[3])
if refused then return refused end
call('EXPIRE', TABLE, 2 * ARGV[4])   -- first: after a write that needs no memory a full server takes all others
touch(number)

local buckets = BUCKETS .. call('HGET', TABLE, 'gen')
local removed, skipped = 0, 0
local shrunk = {}   -- values that were met: the same without this holder, '' for nobody
for at = 1, #ids, 8 do
  local key, field = buckets .. bucket_of(ids, at), sub(ids, at + 2, at + 7)
  local value = pcall_redis('HGET', key, field)
  if type(value) == 'string' then
    local after = shrunk[value]
    if not after then
      after = ''
      if is_value(value) then after = pack_value(byte(value) % 16, put_bit(unpack_mask(value), number, false)) or '' end
      shrunk[value] = after
    end
    if after == '' then
      call('HDEL', key, field)
      removed = removed + 1
    elseif after ~= value then
      call('HSET', key, field, after)
      removed = removed + 1
    end
  elseif value then
    skipped = skipped + 1
  end
end
return {'OK', removed, skipped}
