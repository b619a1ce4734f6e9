-- How do contexts grow, and what do caches serve? Each agent's mean context in the first and the last quarter of its
-- calls, its longest, and its cache hit rate.
-- Parameters: workspace String; since, until DateTime64(6,'UTC') of event time, until exclusive.
-- Units: tokens of input, cached or not; cache_hit_bp in 1/10,000 of all input.
SELECT
  agent,
  count() AS calls,
  toUInt64(round(avgIf(context, nth * 4 <= of_agent))) AS context_first,
  toUInt64(round(avgIf(context, nth * 4 > 3 * of_agent))) AS context_last,
  max(context) AS context_max,
  toUInt32(intDivOrZero(10000 * sum(cached), sum(context))) AS cache_hit_bp
FROM (
  SELECT
    agent,
    input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens AS context,
    cache_read_tokens AS cached,
    row_number() OVER (PARTITION BY team, agent ORDER BY occurred_at, src_partition, src_offset, src_index) AS nth,
    count() OVER (PARTITION BY team, agent) AS of_agent
  FROM usage_events
  WHERE kind = 'charge' AND workspace = {workspace:String}
    AND occurred_at >= {since:DateTime64(6, 'UTC')} AND occurred_at < {until:DateTime64(6, 'UTC')}
)
GROUP BY agent
ORDER BY agent
