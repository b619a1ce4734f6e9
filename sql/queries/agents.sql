-- Who spent it? Each agent's calls, tokens by counter and cost, and when it was first and last heard of.
-- Parameters: workspace String; since, until DateTime64(6,'UTC') of event time, until exclusive.
-- Units: tokens (disjoint counters); cost_nanos in nano-units of currency; times UTC.
SELECT
  workspace, team, agent, currency,
  sum(calls) AS calls,
  uniqExact(run) AS runs,
  sum(input_tokens) AS input_tokens,
  sum(cache_read_tokens) AS cache_read_tokens,
  sum(cache_write_5m_tokens) AS cache_write_5m_tokens,
  sum(cache_write_1h_tokens) AS cache_write_1h_tokens,
  sum(output_tokens) AS output_tokens,
  sum(reasoning_tokens) AS reasoning_tokens,
  sum(cost_nanos) AS cost_nanos,
  min(occurred_at) AS first_at,
  max(occurred_at) AS last_at
FROM net_charges
WHERE workspace = {workspace:String}
  AND occurred_at >= {since:DateTime64(6, 'UTC')} AND occurred_at < {until:DateTime64(6, 'UTC')}
GROUP BY workspace, team, agent, currency
ORDER BY cost_nanos DESC, team, agent
