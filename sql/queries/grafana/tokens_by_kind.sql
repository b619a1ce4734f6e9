-- Tokens of each counter in each interval. The counters are disjoint: input is what no cache served, output includes
-- reasoning.
SELECT $__timeInterval(bucket) AS time,
  sum(input_tokens) AS input,
  sum(cache_read_tokens) AS cache_read,
  sum(cache_write_5m_tokens + cache_write_1h_tokens) AS cache_write,
  sum(output_tokens) AS output
FROM spend_by(step = $__interval_s, since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
WHERE workspace = ${workspace:singlequote}
  AND $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
GROUP BY time
ORDER BY time WITH FILL
  FROM toStartOfInterval($__fromTime, INTERVAL $__interval_s SECOND)
  TO $__toTime
  STEP toIntervalSecond($__interval_s)
