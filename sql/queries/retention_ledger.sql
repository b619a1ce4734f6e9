-- Where in the ledger does a month of usage lie? One row for each ledger partition.
-- Parameters: db Identifier; month UInt32, YYYYMM of event time (UTC).
SELECT ledger_partition, count() AS rows, min(ledger_offset) AS first_offset, max(ledger_offset) AS last_offset
FROM {db:Identifier}.usage_events
WHERE toYYYYMM(occurred_at) = {month:UInt32}
GROUP BY ledger_partition
ORDER BY ledger_partition
