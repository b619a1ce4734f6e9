-- The newest commands, and how long until they were obeyed: halt lag runs from the event time of the crossing usage to
-- the first call that a guard refused, by the guard's clock; the quickest and the slowest agent. Nothing there: nobody
-- has refused a call for it, because nobody made one.
SELECT c.issued_at AS issued_at, toString(any(c.action)) AS action, any(c.scope) AS scope,
  concat(any(c.budget), '/', any(c.cap)) AS cap_of, any(c.fraction_bp) / 10000 AS used,
  uniqExactIf(c.agent, c.agent != '') AS agents,
  min(c.halt_lag_us) / 1000 AS quickest_lag, max(c.halt_lag_us) / 1000 AS slowest_lag,
  any(c.issued_by) AS issued_by, any(c.message) AS message
FROM commands_acked AS c
WHERE c.workspace = ${workspace:singlequote} AND $__timeFilter_ms(c.issued_at)
  AND $__conditionalAll((c.scope_kind IN ('workspace', 'run') OR splitByChar('/', c.scope)[2] IN (${team:singlequote})), $team)
  AND $__conditionalAll((c.scope_kind != 'agent' OR splitByChar('/', c.scope)[3] IN (${agent:singlequote})), $agent)
GROUP BY c.issued_at, c.command_id, c.seq
ORDER BY issued_at DESC, c.command_id, c.seq
LIMIT 50
