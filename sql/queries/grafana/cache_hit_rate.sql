-- The part of all input tokens of the range that a cache served: cache reads over input, cache reads and cache writes
-- together (the counters are disjoint). A fall means the same work costs more.
SELECT sum(cache_read_tokens)
  / greatest(sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens), 1) AS hit_rate
FROM spend_over(since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
WHERE workspace = ${workspace:singlequote}
  AND $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
