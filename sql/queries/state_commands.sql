-- What is the latest word on each scope, budget and cap, of a person's too, as a rebuild of the state takes it over?
--
-- Parameters: since (issued from then on), commands_max UInt64.
-- Units: times in microseconds since the epoch, 0 for none; amounts in `unit`.
SELECT
  command_id, decided_only, seq, toString(action) AS action, scope, budget, cap, budget_version,
  toUnixTimestamp64Micro(issued_at) AS issued_at_us,
  ifNull(toUnixTimestamp64Micro(expires_at), 0) AS expires_at_us,
  window_kind, window_label, window_timezone,
  ifNull(toUnixTimestamp64Micro(window_start), 0) AS window_start_us,
  ifNull(toUnixTimestamp64Micro(window_end), 0) AS window_end_us,
  unit, cap_amount, spend, committed, fraction_bp,
  cause_usage_id, ifNull(toUnixTimestamp64Micro(cause_ts), 0) AS cause_ts_us, cause_partition, cause_offset,
  cause_produced_at_ms, degrade_models, ifNull(degrade_max_output_tokens, 0) AS degrade_max_output_tokens,
  price_book, issued_by, reason, message
FROM commands
WHERE issued_at >= {since:DateTime64(6, 'UTC')}
ORDER BY seq DESC
LIMIT 1 BY scope, budget, cap
LIMIT {commands_max:UInt64}
