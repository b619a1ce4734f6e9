-- What became of each command that was sent: one row for each agent that answered, or one with agent '' if none did.
--
-- halt_lag_us runs from the event time of the crossing usage to the first enforcement, by the guard's clock.
CREATE VIEW IF NOT EXISTS ${DB}.commands_acked AS
SELECT
  c.command_id AS command_id, c.seq AS seq, c.action AS action, c.scope AS scope, c.scope_kind AS scope_kind,
  c.workspace AS workspace, c.budget AS budget, c.cap AS cap, c.unit AS unit, c.cap_amount AS cap_amount,
  c.spend AS spend, c.committed AS committed, c.fraction_bp AS fraction_bp,
  c.window_kind AS window_kind, c.window_start AS window_start, c.window_end AS window_end,
  c.cause_usage_id AS cause_usage_id, c.cause_ts AS cause_ts, c.issued_at AS issued_at, c.expires_at AS expires_at,
  c.issued_by AS issued_by, c.message AS message,
  a.agent AS agent, a.received_at AS received_at, a.enforced_at AS enforced_at, a.halt_lag_us AS halt_lag_us,
  a.guards AS guards
FROM (
  SELECT * FROM ${DB}.commands WHERE decided_only = 0
  ORDER BY ledger_partition, ledger_offset LIMIT 1 BY command_id, seq
) AS c
LEFT JOIN (
  SELECT r.command_id AS command_id, r.seq AS seq, r.agent AS agent,
    minOrNullIf(r.at, r.state = 'received') AS received_at,
    minOrNullIf(r.at, r.state = 'enforced') AS enforced_at,
    argMinOrNullIf(r.halt_lag_us, r.at, r.state = 'enforced') AS halt_lag_us,
    uniqExact(r.guard) AS guards
  FROM ${DB}.acks AS r GROUP BY command_id, seq, agent
) AS a ON a.command_id = c.command_id AND a.seq = c.seq;
