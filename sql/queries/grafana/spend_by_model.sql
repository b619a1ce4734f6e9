-- USD charged on each model in the range, the twelve dearest first.
SELECT concat(provider, '/', model) AS model_name, sum(cost_usd) AS spend
FROM spend_1m
WHERE $__timeFilter(bucket) AND workspace = ${workspace:singlequote} AND currency = 'USD'
  AND $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
GROUP BY model_name
ORDER BY spend DESC, model_name
LIMIT 12
