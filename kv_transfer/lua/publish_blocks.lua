-- Replaces a worker's block snapshot unless a newer one is there.
-- KEYS[1]  blocks:{incarnation}  string: sequence as 8 bytes little-endian, then 16-byte hashes
-- ARGV[1]  snapshot       the new value
-- ARGV[2]  ttl_ms         integer
-- Returns  1 applied, 0 refused: the same or a higher sequence is there
local function sequence(bytes)
  local low, high = struct.unpack('<I4I4', bytes)
  return high * 4294967296 + low
end
local known = redis.call('GETRANGE', KEYS[1], 0, 7)
if #known == 8 and sequence(known) >= sequence(ARGV[1]) then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
