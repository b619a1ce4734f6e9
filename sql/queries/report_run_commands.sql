-- What was a run warned of, and what halted it? Commands that one of its calls caused, that are on the run itself, or that
-- a guard of the run acknowledged; decided_only = 1: decided in shadow, never sent.
-- Parameters: workspace String ('' = all); run String.
-- Units: cap_amount, spend in unit; times UTC; enforced_at is the first refusal by a guard of this run.
WITH
calls AS (
  SELECT usage_id FROM usage_events
  WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND root_run = {run:String}
    AND (team, agent, toStartOfHour(occurred_at)) IN (
      SELECT team, agent, toStartOfHour(occurred_at) FROM usage_events
      WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND root_run = {run:String}
      GROUP BY team, agent, toStartOfHour(occurred_at)
    )
  UNION ALL
  SELECT usage_id FROM usage_events
  WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND run = {run:String}
    AND root_run != {run:String}
    AND (team, agent, toStartOfHour(occurred_at)) IN (
      SELECT team, agent, toStartOfHour(occurred_at) FROM usage_events
      WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND run = {run:String} AND root_run != {run:String}
      GROUP BY team, agent, toStartOfHour(occurred_at)
    )
),
answered AS (
  SELECT command_id, seq, minIf(at, state = 'enforced') AS enforced, countIf(state = 'enforced') AS refusals
  FROM acks
  WHERE run = {run:String} AND ({workspace:String} = '' OR workspace = {workspace:String})
  GROUP BY command_id, seq
)
SELECT
  c.issued_at AS issued_at, toString(c.action) AS action, c.decided_only AS decided_only, c.scope AS scope,
  c.budget AS budget, c.cap AS cap, c.unit AS unit, c.cap_amount AS cap_amount, c.spend AS spend,
  if(a.refusals > 0, toNullable(a.enforced), NULL) AS enforced_at,
  c.issued_by AS issued_by, c.message AS message
FROM (
  SELECT * FROM commands
  WHERE {workspace:String} = '' OR workspace = {workspace:String}
  ORDER BY ledger_partition, ledger_offset LIMIT 1 BY command_id, seq, decided_only
) AS c
LEFT JOIN answered AS a ON a.command_id = c.command_id AND a.seq = c.seq
WHERE c.cause_usage_id IN (SELECT usage_id FROM calls)
  OR c.scope = concat('run:', c.workspace, '/', {run:String})
  OR (c.command_id, c.seq) IN (SELECT command_id, seq FROM answered)
ORDER BY issued_at, scope, budget, cap
LIMIT 1000
