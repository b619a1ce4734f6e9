-- What has each wallet spent: the workspace, its teams, agents and run trees?
-- Parameters: workspace String; since, until DateTime64(6,'UTC') of event time, until exclusive.
-- Units: cost_nanos in nano-units of currency; tokens; cache_hit_bp in 1/10,000 of all input.
SELECT
  splitByChar(':', scope)[1] AS scope_kind,
  scope,
  currency,
  sum(cost_nanos) AS cost_nanos,
  sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens) AS tokens,
  sum(calls) AS calls,
  toUInt32(intDivOrZero(10000 * sum(cache_read_tokens),
    sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens))) AS cache_hit_bp
FROM net_charges
ARRAY JOIN [
  concat('workspace:', workspace),
  concat('team:', workspace, '/', team),
  concat('agent:', workspace, '/', team, '/', agent),
  concat('run:', workspace, '/', root_run)
] AS scope
WHERE workspace = {workspace:String}
  AND occurred_at >= {since:DateTime64(6, 'UTC')} AND occurred_at < {until:DateTime64(6, 'UTC')}
GROUP BY scope, currency
ORDER BY indexOf(['workspace', 'team', 'run', 'agent'], scope_kind), cost_nanos DESC, scope
