-- USD of usage of the range whose event time lies after a halt of its scope was issued, and before that halt expired or
-- was resumed. Zero is what the fuse is for; calls in flight at the halt are what is left. Each usage counts once.
WITH halts AS (
  SELECT scope, budget, cap, seq, issued_at, coalesce(expires_at, toDateTime64('2105-01-01 00:00:00', 6, 'UTC')) AS expires
  FROM commands
  WHERE action = 'halt' AND decided_only = 0 AND workspace = ${workspace:singlequote} AND issued_at <= $__toTime_ms
  ORDER BY ledger_partition, ledger_offset LIMIT 1 BY command_id, seq
),
lifted AS (
  SELECT h.scope AS scope, h.issued_at AS issued_at, h.budget AS budget, h.cap AS cap, min(c.issued_at) AS lifted_at
  FROM halts AS h
  INNER JOIN commands AS c ON c.scope = h.scope AND c.budget = h.budget AND c.cap = h.cap
  WHERE c.decided_only = 0 AND c.action = 'resume' AND c.seq > h.seq
  GROUP BY scope, issued_at, budget, cap
),
stopped AS (
  SELECT h.scope AS scope, h.issued_at AS issued_at, if(l.lifted_at > h.issued_at, least(h.expires, l.lifted_at), h.expires) AS until
  FROM halts AS h
  LEFT JOIN lifted AS l ON l.scope = h.scope AND l.issued_at = h.issued_at AND l.budget = h.budget AND l.cap = h.cap
)
SELECT sum(cost) AS after_halt FROM (
  SELECT any(u.cost_nanos) / 1e9 AS cost
  FROM (
    SELECT scope, occurred_at, cost_nanos, src_topic, src_partition, src_offset, src_index
    FROM usage_events
    ARRAY JOIN [
      concat('workspace:', workspace),
      concat('team:', workspace, '/', team),
      concat('agent:', workspace, '/', team, '/', agent),
      concat('run:', workspace, '/', root_run)
    ] AS scope
    WHERE $__timeFilter_ms(ts) AND kind = 'charge' AND currency = 'USD' AND workspace = ${workspace:singlequote}
      AND $__conditionalAll(team IN (${team:singlequote}), $team)
      AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
      AND scope IN (SELECT scope FROM stopped)
  ) AS u
  INNER JOIN stopped AS s ON s.scope = u.scope
  WHERE u.occurred_at > s.issued_at AND u.occurred_at < s.until
  GROUP BY u.src_topic, u.src_partition, u.src_offset, u.src_index
)
