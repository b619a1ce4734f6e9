-- How long the ledger waited for ClickHouse: seconds from a batch's last message to its insert, the longest of each
-- interval. Of all workspaces. While ClickHouse is away nothing is drawn; an alert and `spendfuse status` say so.
SELECT $__timeInterval(inserted_at) AS time, max(date_diff('millisecond', written_at, inserted_at)) / 1000 AS audit_lag
FROM audit_batches
WHERE leaf_version > 0 AND $__timeFilter_ms(inserted_at)
GROUP BY time
ORDER BY time
