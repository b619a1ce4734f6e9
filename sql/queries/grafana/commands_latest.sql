-- The newest commands, and how long until they were obeyed: halt lag runs from the event time of the crossing usage to
-- the first call that a guard refused, by the guard's clock; the quickest and the slowest agent. Nothing there: nobody
-- has refused a call for it, because nobody made one.
SELECT issued_at, toString(any(action)) AS action, any(scope) AS scope, concat(any(budget), '/', any(cap)) AS cap_of,
  any(fraction_bp) / 10000 AS used,
  uniqExactIf(agent, agent != '') AS agents,
  min(halt_lag_us) / 1000 AS quickest_lag, max(halt_lag_us) / 1000 AS slowest_lag,
  any(issued_by) AS issued_by, any(message) AS message
FROM commands_acked
WHERE workspace = ${workspace:singlequote} AND $__timeFilter_ms(issued_at)
  AND $__conditionalAll((scope_kind IN ('workspace', 'run') OR splitByChar('/', scope)[2] IN (${team:singlequote})), $team)
  AND $__conditionalAll((scope_kind != 'agent' OR splitByChar('/', scope)[3] IN (${agent:singlequote})), $agent)
GROUP BY issued_at, command_id, seq
ORDER BY issued_at DESC, command_id, seq
LIMIT 50
