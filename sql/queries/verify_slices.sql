-- Into which runs of batches is a verification cut, so that each is one query of bounded size?
--
-- Parameters: since, until (instants: batches that the ledger took in this time, until excluded), slice_rows.
-- An empty batch counts as ten rows: headers cost too.
SELECT ledger_partition AS partition, min(seq) AS seq_from, max(seq) AS seq_to, sum(rows) AS should, count() AS batches
FROM (
  SELECT ledger_partition, seq, rows, sum(rows + 10) OVER (PARTITION BY ledger_partition ORDER BY seq) AS upto
  FROM audit_batches
  WHERE leaf_version > 0
    AND written_at >= {since:DateTime64(3, 'UTC')} AND written_at < {until:DateTime64(3, 'UTC')}
)
GROUP BY partition, intDiv(upto, {slice_rows:UInt64})
ORDER BY partition, seq_from
