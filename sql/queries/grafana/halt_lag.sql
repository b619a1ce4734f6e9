-- Halt lag of the halts of the range, one value for each halt and agent: from the event time of the crossing usage to
-- the first call the agent's guard refused, by the guard's clock.
SELECT quantileExactOrNull(0.5)(assumeNotNull(halt_lag_us)) / 1000 AS p50,
  quantileExactOrNull(0.99)(assumeNotNull(halt_lag_us)) / 1000 AS p99
FROM commands_acked
WHERE action = 'halt' AND halt_lag_us IS NOT NULL
  AND workspace = ${workspace:singlequote} AND $__timeFilter_ms(issued_at)
  AND $__conditionalAll(splitByChar('/', agent)[2] IN (${team:singlequote}), $team)
  AND $__conditionalAll(splitByChar('/', agent)[3] IN (${agent:singlequote}), $agent)
