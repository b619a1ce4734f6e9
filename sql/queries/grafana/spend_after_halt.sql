-- USD of usage of the range whose event time lies after a halt of its scope was issued, and before that halt expired or
-- was resumed. Zero is what the fuse is for; calls in flight at the halt are what is left. Each usage counts once.
WITH
halts AS (
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
(
  SELECT groupArray((scope, issued_at, until)) FROM (
    SELECT h.scope AS scope, h.issued_at AS issued_at,
      if(l.lifted_at > h.issued_at, least(h.expires, l.lifted_at), h.expires) AS until
    FROM halts AS h
    LEFT JOIN lifted AS l ON l.scope = h.scope AND l.issued_at = h.issued_at AND l.budget = h.budget AND l.cap = h.cap
    WHERE until > $__fromTime_ms
  )
) AS stops,
arrayMap(stop -> stop.1, stops) AS scopes,
stopped AS (SELECT stop.1 AS scope, stop.2 AS issued_at, stop.3 AS until FROM (SELECT arrayJoin(stops) AS stop)),
-- What was charged by run, agent and hour; of the hours of a halt. An hour that lies in it whole is added as it is, and
-- of the others the usage is looked at one by one.
hours AS (
  SELECT team, agent, root_run, toStartOfHour(occurred_at) AS hour, sum(cost_nanos) AS nanos
  FROM usage_events
  WHERE kind = 'charge' AND currency = 'USD' AND workspace = ${workspace:singlequote}
    AND toStartOfHour(occurred_at) >= toStartOfHour($__fromTime) AND toStartOfHour(occurred_at) <= $__toTime
    AND toStartOfHour(occurred_at) >= toStartOfHour(arrayMin(stop -> stop.2, stops)) AND notEmpty(stops)
    AND (
      (team, agent) IN (SELECT splitByChar('/', scope)[2], splitByChar('/', scope)[3] FROM stopped WHERE scope LIKE 'agent:%')
      OR root_run IN (SELECT substring(scope, position(scope, '/') + 1) FROM stopped WHERE scope LIKE 'run:%')
      OR team IN (SELECT splitByChar('/', scope)[2] FROM stopped WHERE scope LIKE 'team:%')
      OR has(scopes, concat('workspace:', ${workspace:singlequote}))
    )
    AND $__conditionalAll(team IN (${team:singlequote}), $team)
    AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
  GROUP BY team, agent, root_run, hour
),
touched AS (
  SELECT h.team AS team, h.agent AS agent, h.root_run AS root_run, h.hour AS hour, any(h.nanos) AS nanos,
    max(h.hour > s.issued_at AND addHours(h.hour, 1) <= s.until
      AND h.hour >= $__fromTime_ms AND addHours(h.hour, 1) <= $__toTime_ms) AS is_whole
  FROM (
    SELECT team, agent, root_run, hour, nanos, scope
    FROM hours
    ARRAY JOIN [
      concat('workspace:', ${workspace:singlequote}),
      concat('team:', ${workspace:singlequote}, '/', team),
      concat('agent:', ${workspace:singlequote}, '/', team, '/', agent),
      concat('run:', ${workspace:singlequote}, '/', root_run)
    ] AS scope
    WHERE scope IN (SELECT scope FROM stopped)
  ) AS h
  INNER JOIN stopped AS s ON s.scope = h.scope
  WHERE addHours(h.hour, 1) > s.issued_at AND h.hour < s.until
  GROUP BY team, agent, root_run, hour
),
-- As a value, which is worked out once: the sum of the whole hours, and where the others are.
(SELECT (sumIf(nanos, is_whole), groupArrayIf((team, agent, hour, root_run), NOT is_whole)) FROM touched) AS found,
edges AS (SELECT edge.1 AS team, edge.2 AS agent, edge.3 AS hour, edge.4 AS root_run FROM (SELECT arrayJoin(found.2) AS edge))
SELECT sum(nanos) / 1e9 AS after_halt FROM (
  SELECT found.1 AS nanos
  UNION ALL
  SELECT any(u.cost_nanos) AS nanos
  FROM (
    SELECT scope, occurred_at, cost_nanos, src_topic, src_partition, src_offset, src_index
    FROM usage_events
    ARRAY JOIN [
      concat('workspace:', workspace),
      concat('team:', workspace, '/', team),
      concat('agent:', workspace, '/', team, '/', agent),
      concat('run:', workspace, '/', root_run)
    ] AS scope
    PREWHERE toStartOfHour(occurred_at) IN (SELECT hour FROM edges)
    WHERE $__timeFilter_ms(occurred_at) AND kind = 'charge' AND currency = 'USD' AND workspace = ${workspace:singlequote}
      AND (team, agent, toStartOfHour(occurred_at)) IN (SELECT team, agent, hour FROM edges)
      AND (team, agent, toStartOfHour(occurred_at), root_run) IN (SELECT team, agent, hour, root_run FROM edges)
      AND scope IN (SELECT scope FROM stopped)
  ) AS u
  INNER JOIN stopped AS s ON s.scope = u.scope
  WHERE u.occurred_at > s.issued_at AND u.occurred_at < s.until
  GROUP BY u.src_topic, u.src_partition, u.src_offset, u.src_index
  UNION ALL
  -- Corrections are few, and looked at one by one: each belongs to the time of the usage it corrects.
  SELECT any(c.cost_nanos) AS nanos
  FROM (
    SELECT scope, occurred_at, cost_nanos, src_topic, src_partition, src_offset, src_index
    FROM corrections
    ARRAY JOIN [
      concat('workspace:', workspace),
      concat('team:', workspace, '/', team),
      concat('agent:', workspace, '/', team, '/', agent),
      concat('run:', workspace, '/', root_run)
    ] AS scope
    WHERE $__timeFilter_ms(occurred_at) AND currency = 'USD' AND workspace = ${workspace:singlequote}
      AND $__conditionalAll(team IN (${team:singlequote}), $team)
      AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
      AND scope IN (SELECT scope FROM stopped)
  ) AS c
  INNER JOIN stopped AS s ON s.scope = c.scope
  WHERE c.occurred_at > s.issued_at AND c.occurred_at < s.until
  GROUP BY c.src_topic, c.src_partition, c.src_offset, c.src_index
)
