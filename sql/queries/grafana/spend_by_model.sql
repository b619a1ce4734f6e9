-- USD charged on each model in the range, the twelve dearest first.
SELECT concat(provider, '/', model) AS model_name, sum(cost_nanos) / 1e9 AS spend
FROM spend_over(since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
WHERE workspace = ${workspace:singlequote} AND currency = 'USD'
  AND $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
GROUP BY provider, model
ORDER BY spend DESC, model_name
LIMIT 12
