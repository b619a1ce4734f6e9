-- Which agents spent it? From the daily rollup.
-- Parameters: workspace, team String ('' = all); since, until DateTime('UTC') at midnight UTC, until exclusive.
-- Units: tokens (disjoint counters); cost_nanos in nano-units of currency; cache_hit_bp in 1/10,000 of all input.
SELECT
  d.workspace AS workspace, d.team AS team, d.agent AS agent, d.currency AS currency,
  sum(d.calls) AS calls,
  sum(d.late_calls) AS late_calls,
  toInt64(sum(d.input_tokens)) AS input_tokens,
  toInt64(sum(d.cache_read_tokens)) AS cache_read_tokens,
  toInt64(sum(d.cache_write_5m_tokens)) AS cache_write_5m_tokens,
  toInt64(sum(d.cache_write_1h_tokens)) AS cache_write_1h_tokens,
  toInt64(sum(d.output_tokens)) AS output_tokens,
  toInt64(sum(d.reasoning_tokens)) AS reasoning_tokens,
  toUInt32(intDivOrZero(10000 * toInt64(sum(d.cache_read_tokens)),
    toInt64(sum(d.input_tokens + d.cache_read_tokens + d.cache_write_5m_tokens + d.cache_write_1h_tokens)))) AS cache_hit_bp,
  sum(d.cost_nanos) AS cost_nanos
FROM spend_1d AS d
WHERE ({workspace:String} = '' OR d.workspace = {workspace:String})
  AND ({team:String} = '' OR d.team = {team:String})
  AND d.bucket >= {since:DateTime('UTC')} AND d.bucket < {until:DateTime('UTC')}
GROUP BY workspace, team, agent, currency
ORDER BY workspace, currency, cost_nanos DESC, team, agent
