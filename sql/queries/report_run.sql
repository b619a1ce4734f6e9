-- What did a run do, as corrected: tokens by kind, cache hit rate and money on each model? A root run's whole tree; any
-- other run alone.
-- Asked twice, by root run and by run: with OR, neither leaves anything out. Where its calls lie is asked of the sums by
-- run first (projection by_run): the hours of its agents are few.
-- Parameters: workspace String ('' = all); run String.
-- Units: tokens (disjoint counters); cost_nanos in nano-units of currency; cache_hit_bp in 1/10,000 of all input;
-- context_max in tokens of input, cached or not; times UTC.
SELECT
  e.workspace AS workspace, e.provider AS provider, e.model AS model, e.tier AS tier, e.currency AS currency,
  sum(e.calls) AS calls,
  groupUniqArray(100)(concat(e.team, '/', e.agent)) AS agents,
  uniqExact(e.run) AS runs,
  groupUniqArray(10)(e.root_run) AS root_runs,
  groupUniqArray(10)(e.workflow) AS workflows,
  min(e.occurred_at) AS first_at,
  max(e.occurred_at) AS last_at,
  sum(e.input_tokens) AS input_tokens,
  sum(e.cache_read_tokens) AS cache_read_tokens,
  sum(e.cache_write_5m_tokens) AS cache_write_5m_tokens,
  sum(e.cache_write_1h_tokens) AS cache_write_1h_tokens,
  sum(e.output_tokens) AS output_tokens,
  sum(e.reasoning_tokens) AS reasoning_tokens,
  toUInt32(intDivOrZero(10000 * sum(e.cache_read_tokens),
    sum(e.input_tokens + e.cache_read_tokens + e.cache_write_5m_tokens + e.cache_write_1h_tokens))) AS cache_hit_bp,
  max(e.input_tokens + e.cache_read_tokens + e.cache_write_5m_tokens + e.cache_write_1h_tokens) AS context_max,
  sum(e.cost_nanos) AS cost_nanos
FROM (
  SELECT * FROM net_charges
  WHERE ({workspace:String} = '' OR workspace = {workspace:String}) AND root_run = {run:String}
    AND (team, agent, toStartOfHour(occurred_at)) IN (
      SELECT team, agent, toStartOfHour(occurred_at) FROM usage_events
      WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND root_run = {run:String}
      GROUP BY team, agent, toStartOfHour(occurred_at)
    )
  UNION ALL
  SELECT * FROM net_charges
  WHERE ({workspace:String} = '' OR workspace = {workspace:String}) AND run = {run:String}
    AND root_run != {run:String}
    AND (team, agent, toStartOfHour(occurred_at)) IN (
      SELECT team, agent, toStartOfHour(occurred_at) FROM usage_events
      WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND run = {run:String} AND root_run != {run:String}
      GROUP BY team, agent, toStartOfHour(occurred_at)
    )
) AS e
GROUP BY workspace, provider, model, tier, currency
ORDER BY workspace, cost_nanos DESC, provider, model, tier, currency
