-- Who spends, and under which command. state is the strictest command in force at the end of the range on the agent, its
-- team, its workspace or one of its run trees (the first thousand); last command is the newest one of any of them.
-- runs, last_call and run trees are those of the hours of the range.
WITH
standing AS (
  SELECT scope, action, issued_at, expires_at FROM commands
  WHERE decided_only = 0 AND workspace = ${workspace:singlequote} AND issued_at <= $__toTime_ms
  ORDER BY seq DESC LIMIT 1 BY scope, budget, cap
),
by_scope AS (
  SELECT scope,
    max(if(expires_at IS NULL OR expires_at > $__toTime_ms, transform(toString(action), ['halt', 'degrade', 'warn'], [3, 2, 1], 0), 0))
      AS level,
    argMax(toString(action), issued_at) AS newest,
    max(issued_at) AS newest_at
  FROM standing GROUP BY scope
),
spent AS (
  SELECT team, agent, sum(calls) AS calls,
    sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens) AS tokens,
    sum(cache_read_tokens)
      / greatest(sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens), 1) AS cache_hit,
    sum(cost_nanos) / 1e9 AS cost
  FROM spend_over(since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
  WHERE workspace = ${workspace:singlequote} AND currency = 'USD'
    AND $__conditionalAll(team IN (${team:singlequote}), $team)
    AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
  GROUP BY team, agent
  ORDER BY cost DESC, team, agent
  LIMIT 50
),
ran AS (
  SELECT team, agent, uniqExact(run) AS runs, max(last_at) AS last_call,
    groupUniqArrayIf(1000)(concat('run:', ${workspace:singlequote}, '/', root_run),
      concat('run:', ${workspace:singlequote}, '/', root_run) IN (SELECT scope FROM by_scope)) AS trees
  FROM (
    SELECT team, agent, run, root_run, max(occurred_at) AS last_at
    FROM usage_events
    WHERE kind = 'charge' AND workspace = ${workspace:singlequote} AND currency = 'USD'
      AND toStartOfHour(occurred_at) >= toStartOfHour($__fromTime) AND toStartOfHour(occurred_at) <= $__toTime
      AND (team, agent) IN (SELECT team, agent FROM spent)
    GROUP BY team, agent, run, root_run
  )
  GROUP BY team, agent
)
SELECT s.team AS team, s.agent AS agent,
  transform(max(c.level), [3, 2, 1], ['halted', 'degraded', 'warned'], 'armed') AS state,
  argMax(c.newest, c.newest_at) AS last_command,
  if(max(c.newest_at) = toDateTime64(0, 6, 'UTC'), NULL, max(c.newest_at)) AS commanded_at,
  any(s.cost) AS cost, any(s.calls) AS calls, any(s.runs) AS runs, any(s.tokens) AS tokens, any(s.cache_hit) AS cache_hit,
  any(s.last_call) AS last_call
FROM (
  SELECT p.team AS team, p.agent AS agent, p.calls AS calls, p.tokens AS tokens, p.cache_hit AS cache_hit, p.cost AS cost,
    r.runs AS runs, r.last_call AS last_call,
    arrayJoin(arrayConcat(
      [concat('workspace:', ${workspace:singlequote}), concat('team:', ${workspace:singlequote}, '/', p.team),
        concat('agent:', ${workspace:singlequote}, '/', p.team, '/', p.agent)],
      r.trees)) AS scope
  FROM spent AS p
  LEFT JOIN ran AS r ON r.team = p.team AND r.agent = p.agent
) AS s
LEFT JOIN by_scope AS c ON c.scope = s.scope
GROUP BY team, agent
ORDER BY cost DESC, team, agent
