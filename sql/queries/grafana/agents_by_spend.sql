-- Who spends, and under which command. state is the strictest command in force at the end of the range on the agent, its
-- team, its workspace or one of its run trees (the first thousand); last command is the newest one of any of them.
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
  SELECT team, agent, count() AS calls, uniqExact(run) AS runs, max(ts) AS last_call,
    sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens) AS tokens,
    sum(cache_read_tokens)
      / greatest(sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens), 1) AS cache_hit,
    sum(cost_nanos) / 1e9 AS cost,
    arrayConcat(
      [concat('workspace:', any(workspace)), concat('team:', any(workspace), '/', team),
        concat('agent:', any(workspace), '/', team, '/', agent)],
      groupUniqArray(1000)(concat('run:', workspace, '/', root_run))) AS scopes
  FROM usage_events
  WHERE $__timeFilter_ms(ts) AND kind = 'charge' AND currency = 'USD' AND workspace = ${workspace:singlequote}
    AND $__conditionalAll(team IN (${team:singlequote}), $team)
    AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
  GROUP BY team, agent
  ORDER BY cost DESC, team, agent
  LIMIT 50
)
SELECT s.team AS team, s.agent AS agent,
  transform(max(c.level), [3, 2, 1], ['halted', 'degraded', 'warned'], 'armed') AS state,
  argMax(c.newest, c.newest_at) AS last_command,
  if(max(c.newest_at) = toDateTime64(0, 6, 'UTC'), NULL, max(c.newest_at)) AS commanded_at,
  any(s.cost) AS cost, any(s.calls) AS calls, any(s.runs) AS runs, any(s.tokens) AS tokens, any(s.cache_hit) AS cache_hit,
  any(s.last_call) AS last_call
FROM (SELECT *, scope FROM spent ARRAY JOIN scopes AS scope) AS s
LEFT JOIN by_scope AS c ON c.scope = s.scope
GROUP BY team, agent
ORDER BY cost DESC, team, agent
