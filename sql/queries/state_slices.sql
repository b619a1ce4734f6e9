-- Into which runs of batches is the trail's usage cut, so that a rebuild of the pipeline's state reads bounded pieces?
-- Parameters: slice_rows UInt64.
SELECT ledger_partition AS partition, min(batch_seq) AS seq_from, max(batch_seq) AS seq_to, sum(rows) AS rows_in
FROM (
  SELECT ledger_partition, batch_seq, rows, sum(rows) OVER (PARTITION BY ledger_partition ORDER BY batch_seq) AS upto
  FROM (
    SELECT ledger_partition, batch_seq, sum(n) AS rows FROM (
      SELECT ledger_partition, batch_seq, count() AS n FROM usage_events GROUP BY ledger_partition, batch_seq
      UNION ALL SELECT ledger_partition, batch_seq, count() AS n FROM corrections GROUP BY ledger_partition, batch_seq
    )
    GROUP BY ledger_partition, batch_seq
  )
)
GROUP BY partition, intDiv(upto, {slice_rows:UInt64})
ORDER BY partition, seq_from
