"""The Redis store's atomic steps, as Lua: the table of `core/idempotency.py`, and the ledger's part of the same write.

A script has no rollback, so its checks come first, then the one write that can fail (the event's), then the rest.
Keys are made from KEYS[1], the prefix of a shard: they all carry its hash tag, and lie in one slot of a cluster.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from serve_app.core.idempotency import GRACE_MS, REPLAY_MS, RUNNING_MS
from serve_app.core.limits import NOW_US

FORGET = 64  # expired records of a workspace that a new one sweeps out
SLACK_MS = 3600 * 1000  # Redis itself drops a record so long after it expired, if nobody did before
SEEN_MS = 3600 * 1000  # how long a bill may be tried again; callers give up within minutes
BUCKET_SLACK_MS = 60 * 1000  # what a full bucket is kept: a clock of a test stands still
HOUR_SEEN_MS = 40 * 24 * 3600 * 1000  # a reserved hour may be found unbilled until its month is closed


@dataclass(frozen=True, slots=True)
class Script:
    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode()).hexdigest())  # Redis's name for it


# With `allow-oom`, what must go on when memory is full: to finish, to free, to hand events on and remove them.
_ALWAYS, _UNLESS_FULL, _READ = "#!lua flags=allow-oom", "#!lua", "#!lua flags=no-writes"

_NOW = """
local shard = KEYS[1]
local function clock()  -- the server's, or the test's
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local now = clock()
"""

# held: claims by when they expire. sizes: bytes by claim. total: their sum. holders: workspaces that hold any.
_HELD = (
    f"""
local RUNNING_MS, KEPT_MS, SLACK_MS, FORGET = {RUNNING_MS}, {REPLAY_MS + GRACE_MS}, {SLACK_MS}, {FORGET}
"""
    + """
local function record_of(claim) return shard .. 'record:' .. claim end
local function held_by(workspace) return shard .. 'held:' .. workspace end
local function sizes_of(workspace) return shard .. 'sizes:' .. workspace end
local function total_of(workspace) return shard .. 'total:' .. workspace end

local function keep(workspace, claim, expires_ms)
  redis.call('HSET', record_of(claim), 'expires_ms', expires_ms)
  redis.call('PEXPIRE', record_of(claim), expires_ms - now + SLACK_MS)
  redis.call('ZADD', held_by(workspace), expires_ms, claim)
  redis.call('SADD', shard .. 'holders', workspace)
end

local function count(workspace, claim, bytes)
  local before = redis.call('HGET', sizes_of(workspace), claim) or 0
  redis.call('INCRBY', total_of(workspace), bytes - before)
  redis.call('HSET', sizes_of(workspace), claim, bytes)
end

local function drop(workspace, claim)
  count(workspace, claim, 0)
  redis.call('HDEL', sizes_of(workspace), claim)
  redis.call('ZREM', held_by(workspace), claim)
  redis.call('DEL', record_of(claim))
  if redis.call('EXISTS', held_by(workspace)) == 0 then
    redis.call('DEL', total_of(workspace))
    redis.call('SREM', shard .. 'holders', workspace)
  end
end

local function forget(workspace, limit)
  local expired = redis.call('ZRANGEBYSCORE', held_by(workspace), '-inf', now, 'LIMIT', 0, limit)
  for _, claim in ipairs(expired) do drop(workspace, claim) end
  return #expired
end
"""
)

# Every step of a record: ARGV is now, workspace, claim, attempt or op, and what the step alone needs.
_RECORD = """
local workspace, claim = ARGV[2], ARGV[3]
local record = record_of(claim)
local function find()
  local r = redis.call('HMGET', record, 'state', 'fingerprint', 'op', 'attempt', 'attempts', 'lease_ms', 'expires_ms')
  if not r[1] then return nil end
  if tonumber(r[7]) <= now then
    drop(workspace, claim)
    return nil
  end
  return {done = r[1] == 'done', fingerprint = r[2], op = r[3], attempt = r[4], attempts = tonumber(r[5]),
          lease_ms = tonumber(r[6])}
end
local function replay(found)
  local reply = redis.call('HMGET', record, 'body', 'blob')
  return {'replay', found.op, reply[1], reply[2]}
end
"""

# An event is seven arguments: id, JSON, quantity, day, what else its line of the day's sums goes by, and its amount. If
# its workspace has a cap, that follows, in micro-dollars, and for each notice the amount from which it is due, and its
# event. An amount is micro-dollars and the pico-dollars beside them: together they have more digits than a number here.
_APPEND = """
local spending = shard .. 'spent:' .. (ARGV[2] or '')
local function month_of(at) return string.sub(ARGV[at + 3], 1, 7) end
local function spent_in(month)
  local spent = redis.call('HMGET', spending, month, month .. ':picos')
  return tonumber(spent[1] or 0), tonumber(spent[2] or 0)
end
local function spend(month, micros, picos)
  local _, before = spent_in(month)
  picos = picos + before
  redis.call('HINCRBY', spending, month, string.format('%.0f', micros + math.floor(picos / 1000000)))
  redis.call('HSET', spending, month .. ':picos', picos % 1000000)
end
local function is_capped(at) return ARGV[at + 7] and spent_in(month_of(at)) >= tonumber(ARGV[at + 7]) end
local function append(at)
  local json, quantity, day, line = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local sequence = (redis.call('GET', shard .. 'last') or 0) + 1
  redis.call('XADD', shard .. 'events', string.format('%d-0', sequence), 'event', json, 'quantity', quantity)
  redis.call('INCR', shard .. 'last')
  redis.call('ZADD', shard .. 'days', 0, ARGV[2] .. ' ' .. day)
  local sums = shard .. 'usage:' .. ARGV[2] .. ' ' .. day
  redis.call('HINCRBY', sums, 'events:' .. line, 1)
  redis.call('HINCRBY', sums, 'quantity:' .. line, quantity)
  spend(month_of(at), ARGV[at + 5], ARGV[at + 6])
end
local function notify(at, last)
  local micros, picos = spent_in(month_of(at))
  for notice = at + 8, last, 9 do
    local due, beside, once = tonumber(ARGV[notice]), tonumber(ARGV[notice + 1]), 'notice:' .. ARGV[notice + 2]
    if micros > due or (micros == due and picos >= beside) then
      if redis.call('HSETNX', spending, once, 1) == 1 then append(notice + 2) end
    end
  end
end
local function append_once(at, seen_ms)
  local seen = shard .. 'seen:' .. ARGV[at]
  if redis.call('EXISTS', seen) == 1 then return 0 end
  append(at)
  redis.call('SET', seen, 1, 'PX', seen_ms)
  return 1
end
"""


def _script(*parts: str) -> Script:
    return Script("\n".join(parts))


BEGIN = _script(
    _UNLESS_FULL,
    _NOW,
    _HELD,
    _RECORD,
    """
local attempt, op, fingerprint, lease_ms = ARGV[4], ARGV[5], ARGV[6], now + ARGV[7]
local reserve_bytes, max_bytes, max_records = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
forget(workspace, FORGET)
local found = find()
if not found then
  repeat
    local records = redis.call('ZCARD', held_by(workspace))
    local bytes = tonumber(redis.call('GET', total_of(workspace)) or 0)
    local fits = records + 1 <= max_records and bytes + reserve_bytes <= max_bytes
    if not fits and forget(workspace, FORGET) == 0 then return {'over_quota', records, bytes} end
  until fits
  redis.call('HSET', record, 'state', 'running', 'workspace', workspace, 'fingerprint', fingerprint, 'op', op,
             'attempt', attempt, 'attempts', 1, 'lease_ms', lease_ms, 'bytes', reserve_bytes)
  keep(workspace, claim, now + RUNNING_MS)
  count(workspace, claim, reserve_bytes)
  return {'proceed', op, 1}
end
if found.fingerprint ~= fingerprint then return {'mismatch'} end
if found.done then return replay(found) end
if found.attempt == attempt then
  redis.call('HSET', record, 'lease_ms', lease_ms)
  keep(workspace, claim, now + RUNNING_MS)
  return {'proceed', found.op, found.attempts}
end
if found.lease_ms <= now then
  redis.call('HSET', record, 'attempt', attempt, 'attempts', found.attempts + 1, 'lease_ms', lease_ms)
  keep(workspace, claim, now + RUNNING_MS)
  return {'proceed', found.op, found.attempts + 1}
end
return {'busy', found.lease_ms - now}
""",
)

RENEW = _script(
    _ALWAYS,
    _NOW,
    _HELD,
    _RECORD,
    """
local found = find()
if not found then return {'fenced'} end
if found.done then return {'ignored'} end
if found.attempt ~= ARGV[4] then return {'fenced'} end
redis.call('HSET', record, 'lease_ms', now + ARGV[5])
keep(workspace, claim, now + RUNNING_MS)
return {'renewed'}
""",
)

COMPLETE = _script(
    _ALWAYS,
    _NOW,
    _HELD,
    _RECORD,
    _APPEND,
    """
local bytes, kind, reply, tokens = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local found = find()
if not found or found.op ~= ARGV[4] then return {'fenced'} end
if found.done then return replay(found) end
if ARGV[9] and is_capped(9) then
  drop(workspace, claim)
  return {'capped'}
end
if ARGV[9] then append(9) end
if ARGV[16] then notify(9, #ARGV) end
redis.call('HSET', record, 'state', 'done', kind, reply, 'bytes', bytes, 'tokens', tokens)
keep(workspace, claim, now + KEPT_MS)
count(workspace, claim, bytes)
return {'settled'}
""",
)

ABANDON = _script(
    _ALWAYS,
    _NOW,
    _HELD,
    _RECORD,
    """
local found = find()
if not found or found.done or found.attempt ~= ARGV[4] then return {'ignored'} end
drop(workspace, claim)
return {'freed'}
""",
)

EMIT = _script(
    _ALWAYS,
    _NOW,
    _APPEND,
    f"local SEEN_MS = {SEEN_MS}",
    """
if redis.call('EXISTS', shard .. 'seen:' .. ARGV[3]) == 0 and is_capped(3) then return {'capped'} end
local new = append_once(3, SEEN_MS)
if new == 1 then notify(3, #ARGV) end
return {'emitted', new}
""",
)

HOLDINGS = _script(
    _READ,
    _NOW,
    _HELD,
    """
local held, sizes = held_by(ARGV[2]), sizes_of(ARGV[2])
local bytes = tonumber(redis.call('GET', total_of(ARGV[2])) or 0)
for _, claim in ipairs(redis.call('ZRANGEBYSCORE', held, '-inf', now)) do
  bytes = bytes - redis.call('HGET', sizes, claim)
end
return {redis.call('ZCOUNT', held, '(' .. string.format('%d', now), '+inf'), bytes}
""",
)

PURGE = _script(
    _ALWAYS,
    _NOW,
    _HELD,
    """
local left = tonumber(ARGV[2])
for _, workspace in ipairs(redis.call('SMEMBERS', shard .. 'holders')) do
  if left == 0 then break end
  left = left - forget(workspace, left)
end
return ARGV[2] - left
""",
)

# ARGV: sink, sequence before and after, events and quantity more, and sequence and letter of each dead one.
ADVANCE = _script(
    _ALWAYS,
    """
local cursor, dead = KEYS[1] .. 'cursor:' .. ARGV[1], KEYS[1] .. 'dead:' .. ARGV[1]
if tonumber(ARGV[2]) ~= tonumber(redis.call('HGET', cursor, 'sequence') or 0) then return 0 end
redis.call('HSET', cursor, 'sequence', ARGV[3])
redis.call('HINCRBY', cursor, 'events', ARGV[4])
redis.call('HINCRBY', cursor, 'quantity', ARGV[5])
for at = 6, #ARGV, 2 do redis.call('HSET', dead, ARGV[at], ARGV[at + 1]) end
return 1
""",
)

# ARGV: sink, sequence, quantity.
BURY = _script(
    _ALWAYS,
    """
local cursor, dead = KEYS[1] .. 'cursor:' .. ARGV[1], KEYS[1] .. 'dead:' .. ARGV[1]
if redis.call('HDEL', dead, ARGV[2]) == 0 then return 0 end
redis.call('HINCRBY', cursor, 'events', 1)
redis.call('HINCRBY', cursor, 'quantity', ARGV[3])
return 1
""",
)

# ARGV: through, and how many at most. Answers how many went.
TRIM = _script(
    _ALWAYS,
    """
local events, trimmed = KEYS[1] .. 'events', KEYS[1] .. 'trimmed'
local gone = redis.call('XRANGE', events, '-', ARGV[1] .. '-0', 'COUNT', ARGV[2])
if #gone == 0 then return 0 end
local last = tonumber(string.match(gone[#gone][1], '^%d+'))
redis.call('XTRIM', events, 'MINID', string.format('%d-0', last + 1))
redis.call('HSET', trimmed, 'sequence', last)
redis.call('HINCRBY', trimmed, 'events', #gone)
for _, entry in ipairs(gone) do redis.call('HINCRBY', trimmed, 'quantity', entry[2][4]) end
return #gone
""",
)

# ARGV: nothing, workspace, id, reservation ('' once it is settled), arguments of each event, and those.
PUT_RESERVATION = _script(
    _ALWAYS,
    "local shard = KEYS[1]",
    _APPEND,
    f"local SEEN_MS = {HOUR_SEEN_MS}",
    """
for at = 6, #ARGV, ARGV[5] or 1 do
  if append_once(at, SEEN_MS) == 1 then notify(at, at + ARGV[5] - 1) end
end
if ARGV[4] == '' then
  redis.call('HDEL', shard .. 'reservations', ARGV[3])
else
  redis.call('HSET', shard .. 'reservations', ARGV[3], ARGV[4])
end
return 1
""",
)

# What an older version did not count. Whoever opens the store asks for it before he writes, and the first is heeded: so
# nothing that was counted with its bill is counted again. ARGV: workspace, month and amount, again and again.
COUNT = _script(
    _ALWAYS,
    """
if redis.call('SETNX', KEYS[1] .. 'counted', 1) == 0 then return 0 end
for at = 1, #ARGV, 4 do
  local spending, month = KEYS[1] .. 'spent:' .. ARGV[at], ARGV[at + 1]
  redis.call('HSET', spending, month, ARGV[at + 2], month .. ':picos', ARGV[at + 3])
end
return 1
""",
)

# KEYS: the table. ARGV: id, workspace, whether it must be the first.
ADD_WORKSPACE = _script(
    _UNLESS_FULL,
    """
if ARGV[3] == '1' and redis.call('HLEN', KEYS[1]) > 0 then return 0 end
return redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
""",
)

# KEYS: the table. ARGV: key and time, again and again.
TOUCH = _script(
    _UNLESS_FULL,
    """
for at = 1, #ARGV, 2 do
  if tonumber(ARGV[at + 1]) > tonumber(redis.call('HGET', KEYS[1], ARGV[at]) or 0) then
    redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
  end
end
return 1
""",
)

# KEYS: the buckets of an API key. ARGV: now; for requests, then for tokens, if those are limited: microseconds that one
# takes to come back, how many may come at once, the cost, and what is owed. See `core/limits.decide`, which this is.
CHARGE = _script(
    _UNLESS_FULL,
    _NOW,
    f"local NOW_US, SLACK_MS = {NOW_US}, {BUCKET_SLACK_MS}",
    """
local buckets, now_us, names = KEYS[1], now * 1000, {'requests_us', 'tokens_us'}
local left, wait, refused = {0, 0}, {0, 0}, false
local full = redis.call('HMGET', buckets, names[1], names[2])
for i = 1, 2 do left[i] = math.max(0, (tonumber(full[i]) or 0) - now_us) end
for i = 1, (#ARGV - 1) / 4 do
  local each, at_once, cost, owed = unpack(ARGV, 4 * i - 2, 4 * i + 1)
  left[i] = math.max(0, left[i] + owed * each)
  local short = left[i] + (math.min(cost, at_once) - at_once) * each
  if short >= NOW_US then wait[i], refused = short, true end
end
if not refused then
  for i = 1, (#ARGV - 1) / 4 do left[i] = math.max(0, left[i] + ARGV[4 * i] * ARGV[4 * i - 2]) end
end
local longest = math.max(left[1], left[2])
if longest == 0 then redis.call('DEL', buckets) else
  for i = 1, 2 do redis.call('HSET', buckets, names[i], string.format('%.17g', now_us + left[i])) end
  redis.call('PEXPIRE', buckets, math.ceil(longest / 1000) + SLACK_MS)
end
local answer = {}
for i = 1, 2 do
  answer[i], answer[i + 2] = string.format('%.17g', wait[i]), string.format('%.17g', left[i])
end
return answer
""",
)

SCRIPTS = (
    BEGIN,
    RENEW,
    COMPLETE,
    ABANDON,
    EMIT,
    HOLDINGS,
    PURGE,
    ADVANCE,
    BURY,
    TRIM,
    PUT_RESERVATION,
    ADD_WORKSPACE,
    CHARGE,
    TOUCH,
    COUNT,
)
