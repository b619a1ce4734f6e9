-- Agents under a halt that is in force at the end of the range: their own, their team's, their workspace's or their
-- run tree's. Agents that were charged in the range (for a run tree's halt: in its hours), and those that have a halt of
-- their own.
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
  FROM spend_over(since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
  WHERE workspace = ${workspace:singlequote}
    AND (SELECT count() FROM halted WHERE NOT startsWith(scope, 'run:') AND NOT startsWith(scope, 'agent:')) > 0
    AND hasAny([concat('workspace:', workspace), concat('team:', workspace, '/', team)],
      (SELECT groupArray(scope) FROM halted))
  GROUP BY team, agent
  UNION ALL
  SELECT team, agent
  FROM usage_events
  WHERE kind = 'charge' AND workspace = ${workspace:singlequote}
    AND root_run IN (SELECT substring(scope, length(concat('run:', ${workspace:singlequote}, '/')) + 1) FROM halted
      WHERE startsWith(scope, 'run:'))
    AND toStartOfHour(occurred_at) >= toStartOfHour($__fromTime) AND toStartOfHour(occurred_at) <= $__toTime
  GROUP BY team, agent
  UNION ALL
  SELECT splitByChar('/', scope)[2] AS team, splitByChar('/', scope)[3] AS agent FROM halted WHERE scope LIKE 'agent:%'
)
WHERE $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
