-- What was the last word on each budget, workspace and price override, as a rebuild of the state takes it over?
-- Parameters: none. The rows are in the order in which they came; data is JSON.
SELECT kind, data FROM ledger_events
WHERE kind IN ('budget', 'price')
ORDER BY kind, recorded_at, ledger_offset, src_index
