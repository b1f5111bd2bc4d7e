-- Records a handoff as its decode worker says it is: new, or asserted again over what the store lost or got wrong.
-- KEYS[1]  handoff:{transfer id}  hash: state, request_id, decode, prefill, attempt, ttl_ms; another type is replaced
-- ARGV[1]  state          any that is not final
-- ARGV[2]  request_id     text
-- ARGV[3]  decode         incarnation that set the blocks aside
-- ARGV[4]  prefill        incarnation that fills them, or empty
-- ARGV[5]  attempt        integer
-- ARGV[6]  ttl_ms         integer; every transition renews it
-- Returns  1 applied, 0 refused: a record of another decode worker or of a higher attempt is there
if redis.call('TYPE', KEYS[1]).ok == 'hash' then
  local known = redis.call('HMGET', KEYS[1], 'decode', 'attempt')
  local decode, attempt = known[1], tonumber(known[2])
  if decode and attempt and (decode ~= ARGV[3] or attempt > tonumber(ARGV[5])) then
    return 0
  end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'state', ARGV[1], 'request_id', ARGV[2], 'decode', ARGV[3], 'prefill', ARGV[4],
  'attempt', ARGV[5], 'ttl_ms', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return 1
