-- What decisions.py says, where nothing can come between. One key holds one caller:
-- cmsgpack of {leases, window, window, …}; leases = {id, end, id, end, …} and
-- window = {length, first, last, thousandths, first, last, thousandths, …}. Times are in ms.
--
-- KEYS[1]: the caller's. ARGV: "spend", "reserve", "settle" or "look"; the time, or "" for the
-- server's own; the most calls at once; the lease's id; its length; its cost; the id and the cost
-- that it is to have from now on; leases that ended, with commas; then for each limit its
-- thousandths and its window.
-- Answers {time, refused by (0: nothing, the limit's place, or -1: concurrency), retry after,
-- running, and for each limit what is left and when some comes back}.

local PARTS = 60
local CONCURRENCY_RETRY = 1000

local op, lease = ARGV[1], ARGV[4]
local concurrency, length, cost = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local raised, wanted = ARGV[7], tonumber(ARGV[8])
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

-- The call's own lease is put back at the end, unless it ended.
local leases, running, own, ends = {}, 0, nil, nil
for place = 1, #state[1], 2 do
    local id, last = state[1][place], state[1][place + 1]
    if last > now and not ended[id] then
        if op ~= 'look' and (id == lease or (op == 'reserve' and id == raised)) then
            own, ends = id, last
        else
            table.insert(leases, id)
            table.insert(leases, last)
            running = running + 1
        end
    end
end
-- When the cost was spent that is held now; before all time where none is.
local at = (own == lease and ends or 0) - length

-- An entry is three numbers of a window's list, from its second on.
local function keep(window, counted)
    local kept, entries = {window}, spent[window] or {}
    for place = 2, #entries, 3 do
        local first, last, units = entries[place], entries[place + 1], entries[place + 2]
        units = counted(first, last, units)
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

local function holds(window)
    for place = 2, #spent[window], 3 do
        if spent[window][place] <= at and at <= spent[window][place + 1] then
            return true
        end
    end
    return false
end

local function wait(limit, sum)
    local entries = spent[limit.window]
    local over = used(limit.window) + sum - limit.most
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

local function add(window, sum)
    local entries = spent[window]
    local newest = #entries - 2
    if newest > 1 and now - entries[newest] < math.floor(window / PARTS) then
        entries[newest + 1] = now
        entries[newest + 2] = entries[newest + 2] + sum
    else
        table.insert(entries, now)
        table.insert(entries, now)
        table.insert(entries, sum)
    end
end

local function refund(window, sum)
    keep(window, function(first, last, units)
        if first <= at and at <= last then
            units = units - sum
        end
        return units > 0 and units
    end)
end

for _, limit in ipairs(limits) do
    keep(limit.window, function(_, last, units)
        return last + limit.window > now and units
    end)
end

local refused, retry = 0, 0
if op == 'spend' and not own then
    for place, limit in ipairs(limits) do
        local ms = wait(limit, cost)
        if ms > retry then
            refused, retry = place, ms
        end
    end
    if refused == 0 and running >= concurrency then
        refused, retry = -1, CONCURRENCY_RETRY
    end
    if refused == 0 then
        own, ends = lease, now + length
        for _, limit in ipairs(limits) do
            if cost > 0 then
                add(limit.window, cost)
            end
        end
    end
elseif op == 'reserve' and own ~= raised then
    for place, limit in ipairs(limits) do
        local held = holds(limit.window) and cost or 0
        if used(limit.window) - held + wanted > limit.most then
            -- Until there is enough for another try, beside what this one has spent.
            local ms = wait(limit, wanted)
            if ms > retry then
                refused, retry = place, ms
            end
        end
    end
    if refused == 0 then
        own, ends = raised, now + length
        for _, limit in ipairs(limits) do
            refund(limit.window, cost)
            if wanted > 0 then
                add(limit.window, wanted)
            end
        end
    end
elseif op == 'settle' and own then
    own = nil
    for _, limit in ipairs(limits) do
        if wanted < cost then
            refund(limit.window, cost - wanted)
        elseif wanted > cost then
            -- Now, for what was spent at first may be forgotten by now.
            add(limit.window, wanted - cost)
        end
    end
end
if own then
    table.insert(leases, own)
    table.insert(leases, ends)
    running = running + 1
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
