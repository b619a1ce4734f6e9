-- The leaf of every row of some batches: which leaves make up the tree of a batch, and in which order?
--
-- Parameters: partition (ledger partition), seq_from, seq_to (batches, both included).
-- A leaf is the SHA-256 of a row's typed columns in RowBinary: 0 (a leaf), its version, the table's name, the columns in
-- this order; text for enumerations, maps sorted. It is written down in deploy/verifier/README.md, computed alike by
-- spendfuse.audit.seal, and put into verify_batches where that says LEAVES. strayed: a column that is computed from others,
-- and so is in no leaf, says something else than they do.
SELECT 'usage_events' AS kept_in, ledger_partition, batch_seq, batch_row,
  SHA256(formatRow('RowBinary', toUInt8(0), toUInt8(1), 'usage_events', usage_id, toString(kind), toString(usage_kind), workspace, team, agent, run, root_run, parent_run, workflow, provider, model, tier, currency, price_book, priced_by, source, mapSort(tags), rates, occurred_at, recorded_at, input_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos, tier_known, late, src_topic, src_partition, src_offset, src_index, ledger_partition, ledger_offset)) AS leaf,
  cost_center != tags['cost_center'] AS strayed
FROM usage_events
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
UNION ALL
SELECT 'corrections' AS kept_in, ledger_partition, batch_seq, batch_row,
  SHA256(formatRow('RowBinary', toUInt8(0), toUInt8(1), 'corrections', correction_id, usage_id, workspace, team, agent, run, root_run, parent_run, workflow, provider, model, tier, currency, reason, note, stated_by, mapSort(tags), occurred_at, stated_at, recorded_at, input_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos, late, src_topic, src_partition, src_offset, src_index, ledger_partition, ledger_offset)) AS leaf,
  cost_center != tags['cost_center'] AS strayed
FROM corrections
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
UNION ALL
SELECT 'commands' AS kept_in, ledger_partition, batch_seq, batch_row,
  SHA256(formatRow('RowBinary', toUInt8(0), toUInt8(1), 'commands', command_id, toString(action), scope, scope_kind, workspace, budget, cap, window_kind, window_label, window_timezone, unit, cause_usage_id, price_book, issued_by, reason, message, mapSort(degrade_models), degrade_max_output_tokens, expires_at, window_start, window_end, cause_ts, decided_only, seq, budget_version, issued_at, cap_amount, spend, committed, fraction_bp, cause_partition, cause_offset, cause_produced_at_ms, recorded_at, src_topic, src_partition, src_offset, src_index, ledger_partition, ledger_offset)) AS leaf,
  0 AS strayed
FROM commands
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
UNION ALL
SELECT 'acks' AS kept_in, ledger_partition, batch_seq, batch_row,
  SHA256(formatRow('RowBinary', toUInt8(0), toUInt8(1), 'acks', command_id, scope, scope_kind, workspace, budget, cap, agent, run, guard, toString(state), halt_lag_us, seq, at, recorded_at, src_topic, src_partition, src_offset, src_index, ledger_partition, ledger_offset)) AS leaf,
  0 AS strayed
FROM acks
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
UNION ALL
SELECT 'alerts' AS kept_in, ledger_partition, batch_seq, batch_row,
  SHA256(formatRow('RowBinary', toUInt8(0), toUInt8(1), 'alerts', alert_id, kind, severity, scope, scope_kind, workspace, budget, cap, unit, usage_id, message, ts, cap_amount, spend, committed, fraction_bp, recorded_at, src_topic, src_partition, src_offset, src_index, ledger_partition, ledger_offset)) AS leaf,
  0 AS strayed
FROM alerts
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
UNION ALL
SELECT 'ledger_events' AS kept_in, ledger_partition, batch_seq, batch_row,
  SHA256(formatRow('RowBinary', toUInt8(0), toUInt8(1), 'ledger_events', kind, data, recorded_at, src_topic, src_partition, src_offset, src_index, ledger_partition, ledger_offset)) AS leaf,
  0 AS strayed
FROM ledger_events
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
