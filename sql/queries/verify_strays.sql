-- Which rows belong to no sealed batch? And of which number was the last header?
--
-- No parameters. A writer at work has such rows for a moment: those of the batch after the last header. Rows of batch 0
-- were written before there were seals (see verify_unsealed).
SELECT e.ledger_partition AS partition, e.batch_seq AS seq, sum(e.n) AS found, any(h.head) AS head
FROM (
  SELECT ledger_partition, batch_seq, count() AS n FROM usage_events GROUP BY ledger_partition, batch_seq
  UNION ALL SELECT ledger_partition, batch_seq, count() AS n FROM corrections GROUP BY ledger_partition, batch_seq
  UNION ALL SELECT ledger_partition, batch_seq, count() AS n FROM commands GROUP BY ledger_partition, batch_seq
  UNION ALL SELECT ledger_partition, batch_seq, count() AS n FROM acks GROUP BY ledger_partition, batch_seq
  UNION ALL SELECT ledger_partition, batch_seq, count() AS n FROM alerts GROUP BY ledger_partition, batch_seq
  UNION ALL SELECT ledger_partition, batch_seq, count() AS n FROM ledger_events GROUP BY ledger_partition, batch_seq
) AS e
LEFT JOIN (SELECT ledger_partition, max(seq) AS head FROM audit_batches GROUP BY ledger_partition) AS h
  ON h.ledger_partition = e.ledger_partition
WHERE e.batch_seq > 0
  AND (e.ledger_partition, e.batch_seq) NOT IN (SELECT ledger_partition, seq FROM audit_batches WHERE leaf_version > 0)
GROUP BY partition, seq
ORDER BY partition, seq
LIMIT 1000
