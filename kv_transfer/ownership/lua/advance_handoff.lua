-- One transition of a handoff. Idempotent for one attempt; a final state deletes the record.
-- KEYS[1]  handoff:{transfer id}  hash: state, request_id, decode, prefill, attempt, ttl_ms; another type goes
-- ARGV[1]  from           state the caller saw
-- ARGV[2]  to             state it wants; equal to `from` for a rearm, which raises the attempt only
-- ARGV[3]  attempt        integer; a lower one than the record's is refused
-- ARGV[4]  prefill        incarnation that fills the blocks, or empty to leave it
-- ARGV[5]  transitions    the table of kv_transfer/ownership/handoff.py as " FROM>TO FROM>TO ", spaces at both ends
-- ARGV[6]  final          1 if `to` is final
-- Returns  1 applied, 0 refused, 2 unknown id
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then
  redis.call('DEL', KEYS[1])
end
local known = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'ttl_ms')
local state, attempt, ttl_ms = known[1], tonumber(known[2]), tonumber(known[3])
if not state then
  return 2
end
local wanted = tonumber(ARGV[3])
if not attempt or not ttl_ms or wanted < attempt then
  return 0
end
local repeated = state == ARGV[2] and wanted == attempt
local rearmed = state == ARGV[1] and ARGV[1] == ARGV[2] and wanted > attempt
local allowed = state == ARGV[1] and string.find(ARGV[5], ' ' .. state .. '>' .. ARGV[2] .. ' ', 1, true)
if not (repeated or rearmed or allowed) then
  return 0
end
if ARGV[6] == '1' then
  redis.call('DEL', KEYS[1])
  return 1
end
redis.call('HSET', KEYS[1], 'state', ARGV[2], 'attempt', ARGV[3])
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'prefill', ARGV[4])
end
redis.call('PEXPIRE', KEYS[1], ttl_ms)
return 1
