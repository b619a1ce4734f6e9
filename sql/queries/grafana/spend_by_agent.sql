-- USD charged by each agent in each interval: the ten that spent most in the range, and the others together.
WITH top AS (
  SELECT team, agent
  FROM spend_over(since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
  WHERE workspace = ${workspace:singlequote} AND currency = 'USD'
    AND $__conditionalAll(team IN (${team:singlequote}), $team)
    AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
  GROUP BY team, agent ORDER BY sum(cost_nanos) DESC, team, agent LIMIT 10
)
SELECT time, agent_name, Value FROM (
  SELECT time, if((team, agent) IN top, concat(team, '/', agent), 'others') AS agent_name, sum(nanos) / 1e9 AS Value
  FROM (
    SELECT $__timeInterval(bucket) AS time, team, agent, sum(cost_nanos) AS nanos
    FROM spend_by(step = $__interval_s, since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
    WHERE workspace = ${workspace:singlequote} AND currency = 'USD'
      AND $__conditionalAll(team IN (${team:singlequote}), $team)
      AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
    GROUP BY time, team, agent
  )
  GROUP BY time, agent_name
  ORDER BY agent_name, time WITH FILL
    FROM toStartOfInterval($__fromTime, INTERVAL $__interval_s SECOND)
    TO $__toTime
    STEP toIntervalSecond($__interval_s)
)
ORDER BY time, agent_name
