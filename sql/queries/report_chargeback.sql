-- Who is charged for it: each team and cost centre (tag cost_center, '' where a usage has none)? From the charges
-- themselves and their corrections; ClickHouse answers it from their projection by_cost_center, with the bounds written as it is: as dates.
-- Parameters: workspace String ('' = all); since, until Date (UTC), until exclusive.
-- Units: cost_nanos in nano-units of currency.
SELECT workspace, team, cost_center, currency, sum(n) AS calls, sum(nanos) AS cost_nanos
FROM (
  SELECT workspace, team, cost_center, currency, count() AS n, sum(cost_nanos) AS nanos
  FROM usage_events
  WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String})
    AND toDate(occurred_at, 'UTC') >= {since:Date} AND toDate(occurred_at, 'UTC') < {until:Date}
  GROUP BY workspace, team, cost_center, currency
  UNION ALL
  SELECT workspace, team, cost_center, currency, toUInt64(0) AS n, sum(cost_nanos) AS nanos
  FROM corrections
  WHERE ({workspace:String} = '' OR workspace = {workspace:String})
    AND toDate(occurred_at, 'UTC') >= {since:Date} AND toDate(occurred_at, 'UTC') < {until:Date}
  GROUP BY workspace, team, cost_center, currency
)
GROUP BY workspace, team, cost_center, currency
ORDER BY workspace, currency, team, cost_center
