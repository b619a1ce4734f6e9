-- How much of a cap is used, for every cap that has warned, degraded or halted in a window that is still open: what was
-- charged in the window over the cap as its last command gave it, to the minute (holds of calls in flight are not in it).
-- A cap that has said nothing yet is not here; a run's cap, whose window never ends, is here when it spoke in the range.
WITH
caps AS (
  SELECT * FROM (
    SELECT scope, scope_kind, budget, cap, unit, cap_amount, issued_at, window_end,
      toStartOfMinute(toDateTime(multiIf(
        window_kind = 'rolling', toDateTime64($__toTime_ms, 6, 'UTC')
          - toIntervalSecond(toUInt32OrZero(extract(window_label, '[0-9]+')) * if(endsWith(window_label, 'h'), 3600, 60)),
        window_start IS NULL, toDateTime64(0, 6, 'UTC'),
        assumeNotNull(window_start)), 'UTC')) AS counted_from
    FROM commands
    WHERE decided_only = 0 AND unit != '' AND cap_amount > 0
      AND workspace = ${workspace:singlequote} AND issued_at <= $__toTime_ms
      AND $__conditionalAll((scope_kind IN ('workspace', 'run') OR splitByChar('/', scope)[2] IN (${team:singlequote})), $team)
      AND $__conditionalAll((scope_kind != 'agent' OR splitByChar('/', scope)[3] IN (${agent:singlequote})), $agent)
    ORDER BY seq DESC LIMIT 1 BY scope, budget, cap
  )
  WHERE (window_end IS NULL OR window_end > $__toTime_ms) AND (scope_kind != 'run' OR issued_at >= $__fromTime_ms)
),
-- Windows begin at few instants. Between them sums are made of hours; of minutes only in an hour that one of them, or the
-- end of the range, cuts.
(SELECT arraySort(groupUniqArray(counted_from)) FROM caps WHERE scope_kind != 'run') AS begins,
arrayDistinct(arrayPushBack(
  arrayMap(at -> toStartOfHour(at), arrayFilter(at -> at != toStartOfHour(at), begins)),
  toStartOfHour(toDateTime($__toTime, 'UTC')))) AS cut_hours,
charged AS (
  SELECT team, agent, currency, arrayLast(at -> at <= bucket, begins) AS since, sum(nanos) AS nanos, sum(tokens) AS tokens
  FROM (
    SELECT team, agent, currency, bucket, cost_nanos AS nanos,
      toInt64(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens) AS tokens
    FROM spend_1h
    WHERE workspace = ${workspace:singlequote} AND bucket >= begins[1] AND bucket < toStartOfHour($__toTime)
      AND notEmpty(begins) AND bucket NOT IN (SELECT arrayJoin(cut_hours))
    UNION ALL
    SELECT team, agent, currency, bucket, cost_nanos AS nanos,
      toInt64(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens) AS tokens
    FROM spend_1m
    WHERE workspace = ${workspace:singlequote} AND bucket >= begins[1] AND bucket <= $__toTime
      AND notEmpty(begins) AND toStartOfHour(bucket) IN (SELECT arrayJoin(cut_hours))
  )
  GROUP BY team, agent, currency, since
),
by_scope AS (
  SELECT scope, currency, since, sum(nanos) AS nanos, sum(tokens) AS tokens
  FROM charged
  ARRAY JOIN [
    concat('workspace:', ${workspace:singlequote}),
    concat('team:', ${workspace:singlequote}, '/', team),
    concat('agent:', ${workspace:singlequote}, '/', team, '/', agent)
  ] AS scope
  WHERE scope IN (SELECT scope FROM caps)
  GROUP BY scope, currency, since
  UNION ALL
  SELECT concat('run:', ${workspace:singlequote}, '/', root_run) AS scope, currency, toDateTime($__toTime, 'UTC') AS since,
    sum(cost_nanos) AS nanos,
    toInt64(sum(input_tokens) + sum(cache_read_tokens) + sum(cache_write_5m_tokens) + sum(cache_write_1h_tokens)
      + sum(output_tokens)) AS tokens
  FROM usage_events
  WHERE kind = 'charge' AND workspace = ${workspace:singlequote}
    AND root_run IN (
      SELECT substring(scope, length(concat('run:', ${workspace:singlequote}, '/')) + 1) FROM caps WHERE scope_kind = 'run'
    )
    AND toStartOfHour(occurred_at) <= $__toTime
  GROUP BY root_run, currency
  UNION ALL
  SELECT concat('run:', ${workspace:singlequote}, '/', root_run) AS scope, currency, toDateTime($__toTime, 'UTC') AS since,
    sum(cost_nanos) AS nanos,
    sum(input_tokens) + sum(cache_read_tokens) + sum(cache_write_5m_tokens) + sum(cache_write_1h_tokens)
      + sum(output_tokens) AS tokens
  FROM corrections
  WHERE workspace = ${workspace:singlequote}
    AND root_run IN (
      SELECT substring(scope, length(concat('run:', ${workspace:singlequote}, '/')) + 1) FROM caps WHERE scope_kind = 'run'
    )
    AND toStartOfHour(occurred_at) <= $__toTime
  GROUP BY root_run, currency
)
SELECT concat(c.scope, '  ', c.budget, '/', c.cap) AS cap_of,
  sumIf(
    if(c.unit = 'tokens', toInt64(u.tokens), if(c.unit = concat('nano-', u.currency), u.nanos, 0)),
    u.since >= c.counted_from
  ) / any(c.cap_amount) AS used
FROM caps AS c
LEFT JOIN by_scope AS u ON u.scope = c.scope
GROUP BY c.scope, c.budget, c.cap
ORDER BY used DESC, cap_of
LIMIT 12
