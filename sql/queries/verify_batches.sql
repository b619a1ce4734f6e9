-- Do the rows of some batches hash to the roots in their headers? One row for each batch that does not, and why.
--
-- Parameters: partition (ledger partition), seq_from, seq_to (batches, both included); expired_before (instant: what
-- the ledger took before it may be gone), dropped_before (instant: usage of before it was dropped by an entry that says
-- so; of such a batch nothing but usage may be gone). Of a batch that has expired in part the rest cannot be checked.
-- found, should: rows there are and should be; place: the first place of the tree that is empty, or (inserted) that is
-- taken twice or lies beyond it.
WITH
leaves AS (${LEAVES}),
trees AS (
  SELECT
    batch_seq,
    count() AS found,
    countIf(kept_in != 'usage_events') AS others,
    countIf(strayed) AS strayed,
    uniqExact(batch_row) AS places,
    max(batch_row) AS last_place,
    sum(reinterpretAsUInt64(leaf)) AS found_sum,
    arraySort(groupArray(batch_row)) AS taken,
    arrayMap(x -> x.2, arraySort(x -> x.1, groupArray((batch_row, leaf)))) AS level
  FROM leaves GROUP BY batch_seq),
roots AS (
  SELECT
    batch_seq, found, others, strayed, places, last_place, found_sum,
    arrayFirstIndex((place, nth) -> place != nth - 1, taken, arrayEnumerate(taken)) AS odd,
    if(odd = 0, length(taken), toUInt64(odd - 1)) AS gap,
    taken[odd] AS wrong,
    arrayFold(
      (a, step) -> arrayConcat(
        arrayMap(
          (left, right) -> SHA256(concat(unhex('01'), left, right)),
          arrayFilter((x, nth) -> bitAnd(nth, 1) = 1 AND nth < length(a), a, arrayEnumerate(a)),
          arrayFilter((x, nth) -> bitAnd(nth, 1) = 0, a, arrayEnumerate(a))),
        if(bitAnd(length(a), 1) = 1, [a[-1]], [])),
      range(toUInt64(ceil(log2(greatest(length(level), 1))))), level)[1] AS root
  FROM trees)
SELECT
  b.seq AS seq, r.found AS found, b.rows AS should, if(cause = 'inserted', r.wrong, r.gap) AS place,
  multiIf(
    r.found > b.rows OR r.places < r.found OR (r.found > 0 AND r.last_place >= b.rows), 'inserted',
    r.found < b.rows AND (
      b.written_at < {expired_before:DateTime64(3, 'UTC')}
      OR (b.occurred_from < {dropped_before:DateTime64(6, 'UTC')} AND r.others + b.usage_rows = b.rows)
    ), 'expired',
    r.found < b.rows AND r.gap = r.found, 'truncated',
    r.found < b.rows, 'deleted',
    r.strayed > 0, 'altered',
    lower(hex(if(b.rows = 0, SHA256(''), r.root))) = toString(b.merkle_root), '',
    r.found_sum = b.leaf_sum, 'reordered',
    'altered') AS cause
FROM audit_batches AS b
LEFT JOIN roots AS r ON r.batch_seq = b.seq
WHERE b.ledger_partition = {partition:UInt16} AND b.seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
  AND b.leaf_version > 0 AND cause != ''
ORDER BY seq
LIMIT 1000
