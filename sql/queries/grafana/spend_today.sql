-- USD charged since midnight UTC of the day the range ends in, hour by hour. The value is their sum.
SELECT toStartOfHour(bucket) AS time, sum(cost_usd) AS spend
FROM spend_1m
WHERE bucket >= toStartOfDay($__toTime, 'UTC') AND bucket <= $__toTime
  AND workspace = ${workspace:singlequote} AND currency = 'USD'
  AND $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
GROUP BY time
ORDER BY time
