-- How much of a cap is used, for every cap that has warned, degraded or halted in a window that is still open: what was
-- charged in the window over the cap as its last command gave it (holds of calls in flight are not in it). A cap that
-- has said nothing yet is not here.
WITH caps AS (
  SELECT scope, budget, cap, unit, cap_amount,
    multiIf(
      window_kind = 'rolling', toDateTime64($__toTime_ms, 6, 'UTC')
        - toIntervalSecond(toUInt32OrZero(extract(window_label, '[0-9]+')) * if(endsWith(window_label, 'h'), 3600, 60)),
      window_start IS NULL, toDateTime64(0, 6, 'UTC'),
      assumeNotNull(window_start)) AS counted_from,
    window_end
  FROM commands
  WHERE decided_only = 0 AND unit != '' AND cap_amount > 0
    AND workspace = ${workspace:singlequote} AND issued_at <= $__toTime_ms
    AND $__conditionalAll((scope_kind IN ('workspace', 'run') OR splitByChar('/', scope)[2] IN (${team:singlequote})), $team)
    AND $__conditionalAll((scope_kind != 'agent' OR splitByChar('/', scope)[3] IN (${agent:singlequote})), $agent)
  ORDER BY seq DESC LIMIT 1 BY scope, budget, cap
),
charged AS (
  SELECT scope, occurred_at, currency, cost_nanos,
    input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens AS tokens
  FROM usage_events
  ARRAY JOIN [
    concat('workspace:', workspace),
    concat('team:', workspace, '/', team),
    concat('agent:', workspace, '/', team, '/', agent),
    concat('run:', workspace, '/', root_run)
  ] AS scope
  WHERE kind = 'charge' AND workspace = ${workspace:singlequote} AND ts <= $__toTime_ms
    AND ts >= (SELECT min(counted_from) FROM caps) AND scope IN (SELECT scope FROM caps)
)
SELECT concat(c.scope, '  ', c.budget, '/', c.cap) AS cap_of,
  sumIf(
    if(c.unit = 'tokens', toInt64(u.tokens), if(c.unit = concat('nano-', u.currency), u.cost_nanos, 0)),
    u.occurred_at >= c.counted_from
  ) / any(c.cap_amount) AS used
FROM caps AS c
LEFT JOIN charged AS u ON u.scope = c.scope
WHERE c.window_end IS NULL OR c.window_end > $__toTime_ms
GROUP BY c.scope, c.budget, c.cap
ORDER BY used DESC, cap_of
LIMIT 12
