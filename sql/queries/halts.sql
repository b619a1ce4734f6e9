-- Which halts were ordered, and did they stop the agents? One row for each halt and agent that answered;
-- agent '' and no times: nobody has answered yet.
-- Parameters: workspace String; since, until DateTime64(6,'UTC') of the order, until exclusive.
-- Units: spend, cap_amount in unit; times UTC; halt_lag_us microseconds from the crossing usage's event time to the
-- first enforcement, by the guard's clock.
SELECT
  scope, budget, cap, unit, cap_amount, spend, issued_by,
  cause_ts AS crossed_at, issued_at,
  agent, received_at, enforced_at, halt_lag_us, guards, command_id, message
FROM commands_acked
WHERE action = 'halt' AND workspace = {workspace:String}
  AND issued_at >= {since:DateTime64(6, 'UTC')} AND issued_at < {until:DateTime64(6, 'UTC')}
ORDER BY issued_at, scope, budget, cap, agent
