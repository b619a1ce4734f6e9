-- How much was written before there were seals, and is it still as much? One row for each ledger partition with any.
--
-- No parameters. should: rows that the headers of those batches speak of; found: rows of no batch; since: when the
-- first of them was written, by the database's clock. Their number is all that can be checked.
SELECT
  u.ledger_partition AS partition, sum(u.headers) AS batches, sum(u.should) AS should, sum(u.found) AS found,
  min(u.at) AS since
FROM (
  SELECT ledger_partition, count() AS headers, sum(rows) AS should, 0 AS found, min(inserted_at) AS at
  FROM audit_batches WHERE leaf_version = 0 GROUP BY ledger_partition
  UNION ALL SELECT ledger_partition, 0 AS headers, 0 AS should, count() AS found, min(ingested_at) AS at
  FROM usage_events WHERE batch_seq = 0 GROUP BY ledger_partition
  UNION ALL SELECT ledger_partition, 0 AS headers, 0 AS should, count() AS found, min(ingested_at) AS at
  FROM corrections WHERE batch_seq = 0 GROUP BY ledger_partition
  UNION ALL SELECT ledger_partition, 0 AS headers, 0 AS should, count() AS found, min(ingested_at) AS at
  FROM commands WHERE batch_seq = 0 GROUP BY ledger_partition
  UNION ALL SELECT ledger_partition, 0 AS headers, 0 AS should, count() AS found, min(ingested_at) AS at
  FROM acks WHERE batch_seq = 0 GROUP BY ledger_partition
  UNION ALL SELECT ledger_partition, 0 AS headers, 0 AS should, count() AS found, min(ingested_at) AS at
  FROM alerts WHERE batch_seq = 0 GROUP BY ledger_partition
  UNION ALL SELECT ledger_partition, 0 AS headers, 0 AS should, count() AS found, min(ingested_at) AS at
  FROM ledger_events WHERE batch_seq = 0 GROUP BY ledger_partition
) AS u
GROUP BY partition
ORDER BY partition
