-- Is each header the one that follows the header before it? One row for each that is not, and why.
--
-- No parameters: the chain is short beside the rows, and is always followed from its beginning.
-- before: the number of the header before it, 0 when there is none. Batches of leaf version 0 were written before there
-- were seals; the first sealed one holds the last one's content_sha256.
WITH
linked AS (
  SELECT
    ledger_partition, seq, leaf_version, toString(prev_hash) AS prev, toString(header_hash) AS own,
    lower(hex(SHA256(formatRow('RowBinary', toUInt8(2), leaf_version, ledger_partition, seq, first_offset, last_offset,
      rows, usage_rows, leaf_sum, toUnixTimestamp64Milli(written_at), toUnixTimestamp64Micro(occurred_from),
      toUnixTimestamp64Micro(occurred_to), toString(content_sha256), toString(merkle_root), toString(prev_hash))))
    ) AS computed,
    lagInFrame(seq, 1, toUInt64(0)) OVER w AS before,
    lagInFrame(leaf_version, 1, toUInt8(0)) OVER w AS version_before,
    lagInFrame(if(leaf_version = 0, toString(content_sha256), toString(header_hash)), 1, repeat('0', 64)) OVER w AS link
  FROM audit_batches
  WINDOW w AS (PARTITION BY ledger_partition ORDER BY seq, inserted_at ROWS BETWEEN 1 PRECEDING AND CURRENT ROW))
SELECT
  ledger_partition AS partition, seq, before,
  multiIf(
    seq = before AND own != link, 'forked chain',
    seq = before, 'header repeated',
    seq != before + 1, 'missing header',
    leaf_version = 0 AND version_before > 0, 'unsealed after sealed',
    leaf_version = 0, '',
    leaf_version > 1, 'unknown version',
    own != computed, 'header altered',
    prev != link, 'forked chain',
    '') AS cause
FROM linked
WHERE cause != ''
ORDER BY partition, seq
LIMIT 1000
