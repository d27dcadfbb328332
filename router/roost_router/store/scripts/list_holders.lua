-- Replies version, live mask, then for each live holder its number and record; nothing for an empty index.

local fields = call('HGETALL', TABLE)
local version, live, reply = nil, '', {}
for at = 1, #fields, 2 do
  local name, value = fields[at], fields[at + 1]
  if name == 'at' then version = value
  elseif name == 'live' then live = value
  elseif sub(name, 1, 1) == 'r' then
    reply[#reply + 1] = tonumber(sub(name, 2))
    reply[#reply + 1] = value
  end
end
if not version then return {} end
return {version, live, unpack(reply)}
