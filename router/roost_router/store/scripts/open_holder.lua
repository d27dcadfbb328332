-- ARGV: replica, tier, epoch, fence, whether anew ("1": what it held is not known any more), seconds to live
-- Replies OK, number, serial, version; or FENCED, the greatest fence, the newest epoch; or FULL.

local replica, tier, epoch, fence, anew, ttl_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1', ARGV[6]
local name = 'n' .. tier .. ' ' .. replica
local known = call('HGET', TABLE, name)
local holder = known and read_record(known)
if holder then
  if is_less(fence, holder.fence) or is_less(epoch, holder.epoch) then
    return {'FENCED', holder.fence, holder.epoch}
  end
  if epoch == holder.epoch and not anew then
    holder.fence = fence
    write_record(known, holder)
    call('EXPIRE', TABLE, 2 * ttl_s)
    return {'OK', tonumber(known), holder.serial, call('HGET', TABLE, 'at')}
  end
  retire(tonumber(known), holder)
end

local masks = call('HMGET', TABLE, 'live', 'dead')
local live, dead = masks[1] or '', masks[2] or ''
local number = 0
while has_bit(live, number) or has_bit(dead, number) do number = number + 1 end
if number >= MAX_HOLDERS then
  if holder then next_version() end
  return {'FULL'}
end
local version = next_version()
if not call('HGET', TABLE, 'gen') then
  -- Buckets of a table that was lost are never read with the numbers of this one.
  call('HSET', TABLE, 'gen', char(
    floor(version / 16777216) % 256, floor(version / 65536) % 256, floor(version / 256) % 256, version % 256))
end
write_record(number, {serial = version, fence = fence, epoch = epoch, tier = tier, replica = replica})
call('HSET', TABLE, name, number, 'live', put_bit(live, number, true))
call('EXPIRE', TABLE, 2 * ttl_s)
return {'OK', number, version, version}
