-- What became of each halt? The crossing, the order, who stopped when, what was still spent, and how it ended.
-- An incident is one halt that was sent. It ends with the next resume, degrade or halt of its cap, or at its expiry.
-- Spent after: usage of the scope whose event time lies after the order and before that end (calls in flight at the halt
-- are among it). Violations: alerts about this cap in that time, by agents of any kind.
-- Parameters: workspace String, id String (the beginning of a command id): '' = all; since, until
-- DateTime64(6,'UTC') of the order, until exclusive; limit UInt32, the latest first.
-- Agents proved: those whose stop an enrolled guard key has signed; other acks are only claimed.
-- Units: cap_amount, spend_at_halt in unit; nanos_after in nano-units by currency; *_lag_us microseconds from the
-- crossing usage's event time to an agent's first enforcement (its guard's clock); times UTC.
WITH
halts AS (
  SELECT * FROM (
    SELECT command_id, seq, scope, workspace, budget, cap, unit, cap_amount, spend, issued_by, reason, message,
      cause_usage_id, cause_ts, issued_at, expires_at
    FROM commands
    WHERE action = 'halt' AND decided_only = 0 AND ({workspace:String} = '' OR workspace = {workspace:String})
      AND issued_at >= {since:DateTime64(6, 'UTC')} AND issued_at < {until:DateTime64(6, 'UTC')}
      AND startsWith(command_id, {id:String})
    ORDER BY ledger_partition, ledger_offset
    LIMIT 1 BY command_id, seq
  )
  ORDER BY issued_at DESC, scope, budget, cap
  LIMIT {limit:UInt32}
),
followed AS (
  SELECT h.command_id AS command_id, h.seq AS seq,
    argMin(c.action, c.seq) AS next_action, argMin(c.issued_at, c.seq) AS next_at,
    argMin(c.issued_by, c.seq) AS next_by, argMin(c.reason, c.seq) AS next_reason
  FROM halts AS h
  INNER JOIN commands AS c ON c.scope = h.scope AND c.budget = h.budget AND c.cap = h.cap
  WHERE c.decided_only = 0 AND c.action != 'warn' AND c.seq > h.seq
  GROUP BY command_id, seq
),
spans AS (
  SELECT h.*,
    f.next_action AS next_action, f.next_by AS next_by, f.next_reason AS next_reason,
    f.seq > 0 AND (h.expires_at IS NULL OR f.next_at < h.expires_at) AS was_lifted,
    if(was_lifted, toNullable(f.next_at), h.expires_at) AS ended_at,
    coalesce(ended_at, toDateTime64('2105-01-01 00:00:00', 6, 'UTC')) AS until
  FROM halts AS h
  LEFT JOIN followed AS f ON f.command_id = h.command_id AND f.seq = h.seq
),
stopped AS (
  SELECT a.command_id AS command_id, a.seq AS seq,
    min(a.received_at) AS first_received_at, min(a.enforced_at) AS first_enforced_at, max(a.enforced_at) AS all_enforced_at,
    min(a.halt_lag_us) AS first_lag_us, max(a.halt_lag_us) AS last_lag_us,
    count() AS agents, count(a.enforced_at) AS agents_stopped, sum(a.guards) AS guard_count
  FROM commands_acked AS a
  WHERE a.action = 'halt' AND a.agent != '' AND a.command_id IN (SELECT command_id FROM halts)
  GROUP BY command_id, seq
),
proved AS (
  SELECT a.command_id AS command_id, a.seq AS seq, uniqExact(a.agent) AS agents
  FROM acks AS a
  INNER JOIN ledger_events AS p ON p.src_topic = a.src_topic AND p.src_partition = a.src_partition
    AND p.src_offset = a.src_offset
  WHERE p.kind = 'proof' AND a.state = 'enforced' AND a.command_id IN (SELECT command_id FROM halts)
  GROUP BY command_id, seq
),
(SELECT groupArray((command_id, seq, scope, issued_at, until)) FROM spans) AS stops,
lasting AS (
  SELECT stop.1 AS command_id, stop.2 AS seq, stop.3 AS scope, stop.4 AS issued_at, stop.5 AS until
  FROM (SELECT arrayJoin(stops) AS stop)
),
-- By run, agent and hour first: an hour that lies in an incident whole is added as it is, the usage of others one by one.
hours AS (
  SELECT workspace, team, agent, root_run, currency, toStartOfHour(occurred_at) AS hour, count() AS calls,
    toInt64(sum(input_tokens) + sum(cache_read_tokens) + sum(cache_write_5m_tokens) + sum(cache_write_1h_tokens)
      + sum(output_tokens)) AS tokens,
    sum(cost_nanos) AS nanos, max(occurred_at) AS last_at
  FROM usage_events
  WHERE kind = 'charge' AND toStartOfHour(occurred_at) >= toStartOfHour(arrayMin(stop -> stop.4, stops)) AND notEmpty(stops)
  GROUP BY workspace, team, agent, root_run, currency, hour
  UNION ALL
  SELECT workspace, team, agent, root_run, currency, toStartOfHour(occurred_at) AS hour, toUInt64(0) AS calls,
    sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens) AS tokens,
    sum(cost_nanos) AS nanos, max(occurred_at) AS last_at
  FROM corrections
  WHERE toStartOfHour(occurred_at) >= toStartOfHour(arrayMin(stop -> stop.4, stops)) AND notEmpty(stops)
  GROUP BY workspace, team, agent, root_run, currency, hour
),
touched AS (
  SELECT s.command_id AS command_id, s.seq AS seq, h.workspace AS workspace, h.team AS team, h.agent AS agent,
    h.root_run AS root_run, h.currency AS currency, h.hour AS hour, h.calls AS calls, h.tokens AS tokens, h.nanos AS nanos,
    h.last_at AS last_at, h.hour > s.issued_at AND addHours(h.hour, 1) <= s.until AS is_whole
  FROM lasting AS s
  INNER JOIN (
    SELECT *, scope
    FROM hours
    ARRAY JOIN [
      concat('workspace:', workspace),
      concat('team:', workspace, '/', team),
      concat('agent:', workspace, '/', team, '/', agent),
      concat('run:', workspace, '/', root_run)
    ] AS scope
    WHERE scope IN (SELECT scope FROM lasting)
  ) AS h ON h.scope = s.scope
  WHERE addHours(h.hour, 1) > s.issued_at AND h.hour < s.until
),
spent AS (
  SELECT command_id, seq, sum(calls) AS calls, uniqExact(team, agent) AS agents, sum(tokens) AS tokens,
    sumMap(map(currency, nanos)) AS nanos, max(last_at) AS last_at
  FROM (
    SELECT command_id, seq, calls, team, agent, tokens, toString(currency) AS currency, nanos, last_at
    FROM touched WHERE is_whole
    UNION ALL
    SELECT s.command_id, s.seq, u.calls, u.team, u.agent, u.tokens, u.currency, u.cost_nanos AS nanos, u.occurred_at
    FROM lasting AS s
    INNER JOIN (
      SELECT scope, team, agent, occurred_at, toString(currency) AS currency, cost_nanos, calls,
        input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens AS tokens
      FROM net_charges
      ARRAY JOIN [
        concat('workspace:', workspace),
        concat('team:', workspace, '/', team),
        concat('agent:', workspace, '/', team, '/', agent),
        concat('run:', workspace, '/', root_run)
      ] AS scope
      WHERE scope IN (SELECT scope FROM lasting)
        AND (workspace, team, agent, toStartOfHour(occurred_at), root_run) IN (
          SELECT workspace, team, agent, hour, root_run FROM touched WHERE NOT is_whole
        )
    ) AS u ON u.scope = s.scope
    WHERE u.occurred_at > s.issued_at AND u.occurred_at < s.until
      AND NOT (toStartOfHour(u.occurred_at) > s.issued_at AND addHours(toStartOfHour(u.occurred_at), 1) <= s.until)
  )
  GROUP BY command_id, seq
),
violated AS (
  SELECT s.command_id AS command_id, s.seq AS seq, uniqExact(a.alert_id) AS alerts
  FROM spans AS s
  INNER JOIN alerts AS a ON a.workspace = s.workspace AND a.budget = s.budget AND a.cap = s.cap
  WHERE a.kind = 'violation' AND a.ts > s.issued_at AND a.ts < s.until
    AND (s.scope = a.scope OR NOT startsWith(s.scope, 'agent:'))
  GROUP BY command_id, seq
)
SELECT
  s.command_id AS command_id, s.seq AS seq, s.scope AS scope, s.budget AS budget, s.cap AS cap, s.unit AS unit,
  s.cap_amount AS cap_amount, s.spend AS spend_at_halt, s.issued_by AS issued_by, s.reason AS reason,
  s.message AS message, s.cause_usage_id AS cause_usage_id, s.cause_ts AS crossed_at, s.issued_at AS issued_at,
  k.first_received_at AS received_at, k.first_enforced_at AS enforced_at, k.all_enforced_at AS all_enforced_at,
  k.first_lag_us AS first_lag_us, k.last_lag_us AS last_lag_us,
  k.agents AS agents, k.agents_stopped AS agents_stopped, o.agents AS agents_proved, k.guard_count AS guards,
  p.calls AS calls_after, p.agents AS agents_after, p.tokens AS tokens_after, p.nanos AS nanos_after,
  if(p.calls > 0, toNullable(p.last_at), NULL) AS last_spent_at,
  v.alerts AS violations,
  s.ended_at AS ended_at,
  multiIf(s.was_lifted, toString(s.next_action), s.ended_at IS NULL, '', 'expiry') AS ended_by,
  if(s.was_lifted, s.next_by, '') AS lifted_by, if(s.was_lifted, s.next_reason, '') AS lift_reason
FROM spans AS s
LEFT JOIN stopped AS k ON k.command_id = s.command_id AND k.seq = s.seq
LEFT JOIN proved AS o ON o.command_id = s.command_id AND o.seq = s.seq
LEFT JOIN spent AS p ON p.command_id = s.command_id AND p.seq = s.seq
LEFT JOIN violated AS v ON v.command_id = s.command_id AND v.seq = s.seq
ORDER BY issued_at DESC, scope, budget, cap
