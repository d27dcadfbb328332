-- ARGV: number, serial, fence
-- Replies OK, or GONE where it is not or no longer; or FENCED, the greatest fence.

local refused = refusal(ARGV[1], ARGV[2], ARGV[3])
if refused then return refused end
retire(tonumber(ARGV[1]), read_record(ARGV[1]))
next_version()
return {'OK'}
