-- How many calls were charged in a time? From the daily rollup.
-- Parameters: workspace String ('' = all); since, until DateTime('UTC') at midnight UTC, until exclusive.
SELECT sum(d.calls) AS calls
FROM spend_1d AS d
WHERE ({workspace:String} = '' OR d.workspace = {workspace:String})
  AND d.bucket >= {since:DateTime('UTC')} AND d.bucket < {until:DateTime('UTC')}
