-- Agents under a halt that is in force at the end of the range: their own, their team's, their workspace's or their
-- run tree's. Agents that spent in the range, and those that have a halt of their own.
WITH halted AS (
  SELECT scope FROM (
    SELECT scope, action, expires_at FROM commands
    WHERE decided_only = 0 AND workspace = ${workspace:singlequote} AND issued_at <= $__toTime_ms
    ORDER BY seq DESC LIMIT 1 BY scope, budget, cap
  )
  WHERE action = 'halt' AND (expires_at IS NULL OR expires_at > $__toTime_ms)
)
SELECT uniqExact(team, agent) AS halted FROM (
  SELECT team, agent
  FROM usage_events
  ARRAY JOIN [
    concat('workspace:', workspace),
    concat('team:', workspace, '/', team),
    concat('agent:', workspace, '/', team, '/', agent),
    concat('run:', workspace, '/', root_run)
  ] AS scope
  WHERE $__timeFilter_ms(ts) AND workspace = ${workspace:singlequote} AND scope IN (SELECT scope FROM halted)
  UNION ALL
  SELECT splitByChar('/', scope)[2] AS team, splitByChar('/', scope)[3] AS agent FROM halted WHERE scope LIKE 'agent:%'
)
WHERE $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
