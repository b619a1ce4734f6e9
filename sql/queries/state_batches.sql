-- Up to which batch of each ledger partition is the trail whole?
-- Parameters: none.
SELECT ledger_partition, max(seq) AS seq FROM audit_batches GROUP BY ledger_partition ORDER BY ledger_partition
