-- USD charged by each team in each interval; an interval without usage is zero.
SELECT time, team, Value FROM (
  SELECT $__timeInterval(bucket) AS time, team, sum(cost_nanos) / 1e9 AS Value
  FROM spend_by(step = $__interval_s, since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
  WHERE workspace = ${workspace:singlequote} AND currency = 'USD'
    AND $__conditionalAll(team IN (${team:singlequote}), $team)
    AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
  GROUP BY time, team
  ORDER BY team, time WITH FILL
    FROM toStartOfInterval($__fromTime, INTERVAL $__interval_s SECOND)
    TO $__toTime
    STEP toIntervalSecond($__interval_s)
)
ORDER BY time, team
