-- What must a report's rows add up to? From the daily rollup, which knows nothing of tags: another way to the same sum.
-- Parameters: workspace String ('' = all); since, until DateTime('UTC') at midnight UTC, until exclusive.
-- Units: cost_nanos in nano-units of currency.
SELECT
  d.currency AS currency,
  sum(d.calls) AS calls,
  sum(d.cost_nanos) AS cost_nanos
FROM spend_1d AS d
WHERE ({workspace:String} = '' OR d.workspace = {workspace:String})
  AND d.bucket >= {since:DateTime('UTC')} AND d.bucket < {until:DateTime('UTC')}
GROUP BY currency
ORDER BY currency
