-- What decisions.py says, where nothing can come between. One key holds one caller:
-- cmsgpack of {leases, window, window, …}; leases = {id, end, id, end, …} and
-- window = {length, first, last, thousandths, first, last, thousandths, …}. Times are in ms.
--
-- KEYS[1]: the caller's. ARGV: "spend", "settle" or "look"; the time, or "" for the server's own;
-- the most calls at once; the lease's id; its length; the cost; when a settled call was let in;
-- what it is to cost; leases that ended, with commas; then for each limit its thousandths and its
-- window.
-- Answers {time, refused by (0: nothing, the limit's place, or -1: concurrency), retry after,
-- running, and for each limit what is left and when some comes back}.

local PARTS = 60
local CONCURRENCY_RETRY = 1000

local op, lease = ARGV[1], ARGV[4]
local concurrency, length, cost = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local at, settled = tonumber(ARGV[7]), tonumber(ARGV[8])
local now = tonumber(ARGV[2])
if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local ended = {}
for other in string.gmatch(ARGV[9], '[^,]+') do
    ended[other] = true
end

local limits, spent = {}, {}
for place = 10, #ARGV, 2 do
    table.insert(limits, {most = tonumber(ARGV[place]), window = tonumber(ARGV[place + 1])})
end

local stored = redis.call('GET', KEYS[1])
local state = stored and cmsgpack.unpack(stored) or {{}}
for place = 2, #state do
    for _, limit in ipairs(limits) do
        if limit.window == state[place][1] then
            spent[limit.window] = state[place]
            now = math.max(now, state[place][#state[place] - 1])
        end
    end
end

local leases, running, held = {}, 0, false
for place = 1, #state[1], 2 do
    if state[1][place + 1] > now and not ended[state[1][place]] then
        if op == 'settle' and state[1][place] == lease then
            held = true
        else
            table.insert(leases, state[1][place])
            table.insert(leases, state[1][place + 1])
            running = running + 1
        end
    end
end

-- An entry is three numbers of a window's list, from its second on.
local function keep(window, wanted)
    local kept, entries = {window}, spent[window] or {}
    for place = 2, #entries, 3 do
        local first, last, units = entries[place], entries[place + 1], entries[place + 2]
        units = wanted(first, last, units)
        if units then
            table.insert(kept, first)
            table.insert(kept, last)
            table.insert(kept, units)
        end
    end
    spent[window] = kept
end

local function used(window)
    local sum = 0
    for place = 4, #spent[window], 3 do
        sum = sum + spent[window][place]
    end
    return sum
end

local function wait(limit)
    local entries = spent[limit.window]
    local over = used(limit.window) + cost - limit.most
    if over <= 0 then
        return 0
    end
    for place = 2, #entries, 3 do
        over = over - entries[place + 2]
        if over <= 0 then
            return entries[place + 1] + limit.window - now
        end
    end
    return limit.window
end

local function add(window)
    local entries = spent[window]
    local newest = #entries - 2
    if newest > 1 and now - entries[newest] < math.floor(window / PARTS) then
        entries[newest + 1] = now
        entries[newest + 2] = entries[newest + 2] + cost
    else
        table.insert(entries, now)
        table.insert(entries, now)
        table.insert(entries, cost)
    end
end

for _, limit in ipairs(limits) do
    keep(limit.window, function(_, last, units)
        return last + limit.window > now and units
    end)
end

local refused, retry = 0, 0
if op == 'spend' then
    for place, limit in ipairs(limits) do
        local ms = wait(limit)
        if ms > retry then
            refused, retry = place, ms
        end
    end
    if refused == 0 and running >= concurrency then
        refused, retry = -1, CONCURRENCY_RETRY
    end
    if refused == 0 then
        table.insert(leases, lease)
        table.insert(leases, now + length)
        running = running + 1
        if cost > 0 then
            for _, limit in ipairs(limits) do
                add(limit.window)
            end
        end
    end
elseif held then
    for _, limit in ipairs(limits) do
        keep(limit.window, function(first, last, units)
            if first <= at and at <= last then
                units = math.max(0, units + settled - cost)
            end
            return units > 0 and units
        end)
    end
end

local answer = {now, refused, retry, running}
local kept, life = {leases}, 0
for place = 2, #leases, 2 do
    life = math.max(life, leases[place] - now)
end
for _, limit in ipairs(limits) do
    local entries = spent[limit.window]
    table.insert(answer, math.max(0, limit.most - used(limit.window)))
    table.insert(answer, #entries > 1 and entries[3] + limit.window - now or 0)
    if #entries > 1 then
        table.insert(kept, entries)
        life = math.max(life, entries[#entries - 1] + limit.window - now)
    end
end
if op ~= 'look' then
    if life > 0 then
        redis.call('SET', KEYS[1], cmsgpack.pack(kept), 'PX', life)
    else
        redis.call('DEL', KEYS[1])
    end
end
return answer
