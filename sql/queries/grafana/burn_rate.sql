-- USD an hour, from the last interval that is complete (at least a minute). A minute without usage counts as zero: a
-- wallet that has stopped burning shows 0, not its last rate.
SELECT $__timeInterval(bucket) AS time, sum(cost_nanos) / 1e9 * 3600 / $__interval_s AS burn
FROM spend_by(step = $__interval_s, since = toUnixTimestamp($__fromTime), until = toUnixTimestamp($__toTime))
WHERE bucket < toStartOfInterval($__toTime, INTERVAL $__interval_s SECOND)
  AND workspace = ${workspace:singlequote} AND currency = 'USD'
  AND $__conditionalAll(team IN (${team:singlequote}), $team)
  AND $__conditionalAll(agent IN (${agent:singlequote}), $agent)
GROUP BY time
ORDER BY time WITH FILL
  FROM toStartOfInterval($__fromTime, INTERVAL $__interval_s SECOND)
  TO toStartOfInterval($__toTime, INTERVAL $__interval_s SECOND)
  STEP toIntervalSecond($__interval_s)
