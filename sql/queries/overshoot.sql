-- How much was spent past the cap of each halted scope?
-- spend_at_halt is what the fuse had counted when it tripped; spend_final what was charged in the window in the end,
-- up to its end or until the cap was resumed. A person's halt has no cap and is left out. A rolling window has no
-- start of its own: there, what came after the crossing usage is added to spend_at_halt.
-- Parameters: workspace String; since, until DateTime64(6,'UTC') of the order, until exclusive.
-- Units: cap_amount, spend_at_halt, spend_final, overshoot in unit; overshoot_bp in 1/10,000 of the cap.
WITH
halts AS (
  SELECT scope, budget, cap, unit, cap_amount, spend, cause_ts, issued_at, window_kind,
    window_kind = 'rolling' AS is_rolling,
    multiIf(is_rolling, cause_ts, window_kind = 'run' OR window_start IS NULL, toDateTime64(0, 6, 'UTC'), window_start)
      AS counted_from,
    coalesce(window_end, toDateTime64('2105-01-01 00:00:00', 6, 'UTC')) AS counted_to
  FROM commands
  WHERE action = 'halt' AND decided_only = 0 AND unit != '' AND cause_ts IS NOT NULL
    AND workspace = {workspace:String}
    AND issued_at >= {since:DateTime64(6, 'UTC')} AND issued_at < {until:DateTime64(6, 'UTC')}
  ORDER BY ledger_partition, ledger_offset
  LIMIT 1 BY command_id, seq
),
resumed AS (
  SELECT h.scope AS scope, h.budget AS budget, h.cap AS cap, h.issued_at AS issued_at, min(c.issued_at) AS resumed_at
  FROM halts AS h
  INNER JOIN commands AS c ON c.scope = h.scope AND c.budget = h.budget AND c.cap = h.cap
  WHERE c.action = 'resume' AND c.decided_only = 0 AND c.issued_at >= h.issued_at
  GROUP BY scope, budget, cap, issued_at
),
charged AS (
  SELECT scope, occurred_at, currency, cost_nanos,
    input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens AS tokens
  FROM net_charges
  ARRAY JOIN [
    concat('workspace:', workspace),
    concat('team:', workspace, '/', team),
    concat('agent:', workspace, '/', team, '/', agent),
    concat('run:', workspace, '/', root_run)
  ] AS scope
  WHERE workspace = {workspace:String} AND scope IN (SELECT scope FROM halts)
)
SELECT
  h.scope AS scope, h.budget AS budget, h.cap AS cap, h.unit AS unit, h.window_kind AS window_kind,
  any(h.cause_ts) AS crossed_at, h.issued_at AS issued_at,
  any(h.cap_amount) AS cap_amount,
  any(h.spend) AS spend_at_halt,
  if(any(h.is_rolling), any(h.spend), 0) + sumIf(
    if(h.unit = 'tokens', toInt64(u.tokens), if(h.unit = concat('nano-', u.currency), u.cost_nanos, 0)),
    if(h.is_rolling, u.occurred_at > h.counted_from, u.occurred_at >= h.counted_from)
      AND u.occurred_at < h.counted_to
      AND (r.resumed_at IS NULL OR u.occurred_at < r.resumed_at)
  ) AS spend_final,
  greatest(spend_final - cap_amount, 0) AS overshoot,
  toInt64(intDivOrZero(10000 * overshoot, cap_amount)) AS overshoot_bp
FROM halts AS h
LEFT JOIN charged AS u ON u.scope = h.scope
LEFT JOIN (
  SELECT scope, budget, cap, issued_at, toNullable(resumed_at) AS resumed_at FROM resumed
) AS r ON r.scope = h.scope AND r.budget = h.budget AND r.cap = h.cap AND r.issued_at = h.issued_at
GROUP BY scope, budget, cap, unit, window_kind, issued_at
ORDER BY issued_at, scope, budget, cap
