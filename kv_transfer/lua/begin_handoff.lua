-- Records a reservation. Idempotent: the same reservation again is applied again.
-- KEYS[1]  handoff:{transfer id}  hash: state, request_id, decode, prefill, attempt, ttl_ms
-- ARGV[1]  state          RESERVED
-- ARGV[2]  request_id     text
-- ARGV[3]  decode         incarnation that set the blocks aside
-- ARGV[4]  prefill        incarnation that fills them, or empty
-- ARGV[5]  attempt        integer
-- ARGV[6]  ttl_ms         integer; every transition renews it
-- Returns  1 applied, 0 refused: the id is known otherwise
local known = redis.call('HMGET', KEYS[1], 'state', 'request_id', 'decode', 'attempt')
if known[1] then
  if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] or known[3] ~= ARGV[3] or known[4] ~= ARGV[5] then
    return 0
  end
else
  redis.call('HSET', KEYS[1], 'state', ARGV[1], 'request_id', ARGV[2], 'decode', ARGV[3], 'prefill', ARGV[4],
    'attempt', ARGV[5], 'ttl_ms', ARGV[6])
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return 1
