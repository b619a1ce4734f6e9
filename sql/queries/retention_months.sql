-- Which months of usage are there, and what would go with each? Oldest first.
-- Parameters: db Identifier.
-- Units: month as the partition's name, YYYYMM of event time (UTC); cost_nanos of charges, by currency; times UTC.
SELECT
  toString(toYYYYMM(occurred_at)) AS month,
  count() AS rows,
  max(ingested_at) AS newest_at,
  sumMapIf(map(toString(currency), cost_nanos), kind = 'charge') AS cost_nanos
FROM {db:Identifier}.usage_events
GROUP BY month
ORDER BY month
