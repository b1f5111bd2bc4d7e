-- Removes the hint for Resume if it still names the caller: a zombie must not hide its successor.
-- KEYS[1]  stream:{request id}  string: incarnation of the decode worker that holds the stream; another type goes
-- ARGV[1]  decode         incarnation that gives the stream up
-- Returns  1 removed, 0 not the caller's
if redis.call('TYPE', KEYS[1]).ok == 'string' and redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
