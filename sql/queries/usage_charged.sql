-- What was charged for a usage, and what corrections have added to it since? One row for each agent that has such a usage.
--
-- Parameters: usage_id String.
-- Units: tokens; cost_nanos in nano-units of currency; rates in nano-units per million tokens; ts_us in microseconds since
-- the epoch. fixes are the corrections there are, fixed_* what they add.
SELECT
  u.workspace AS workspace, u.team AS team, u.agent AS agent, u.run AS run, u.root_run AS root_run,
  u.parent_run AS parent_run, u.workflow AS workflow, u.provider AS provider, u.model AS model, u.tier AS tier, u.tags AS tags,
  toUnixTimestamp64Micro(u.occurred_at) AS ts_us, u.currency AS currency, u.rates AS rates,
  toInt64(u.input_tokens) AS input, toInt64(u.cache_read_tokens) AS cache_read,
  toInt64(u.cache_write_5m_tokens) AS cache_write_5m, toInt64(u.cache_write_1h_tokens) AS cache_write_1h,
  toInt64(u.output_tokens) AS output, toInt64(u.reasoning_tokens) AS reasoning, u.cost_nanos AS cost_nanos,
  f.fixes AS fixes, f.fixed_input AS fixed_input, f.fixed_cache_read AS fixed_cache_read,
  f.fixed_cache_write_5m AS fixed_cache_write_5m, f.fixed_cache_write_1h AS fixed_cache_write_1h,
  f.fixed_output AS fixed_output, f.fixed_reasoning AS fixed_reasoning, f.fixed_cost_nanos AS fixed_cost_nanos
FROM usage_events AS u
LEFT JOIN (
  SELECT workspace, team, agent, count() AS fixes, sum(input_tokens) AS fixed_input,
    sum(cache_read_tokens) AS fixed_cache_read, sum(cache_write_5m_tokens) AS fixed_cache_write_5m,
    sum(cache_write_1h_tokens) AS fixed_cache_write_1h, sum(output_tokens) AS fixed_output,
    sum(reasoning_tokens) AS fixed_reasoning, sum(cost_nanos) AS fixed_cost_nanos
  FROM corrections WHERE usage_id = {usage_id:String} GROUP BY workspace, team, agent
) AS f ON f.workspace = u.workspace AND f.team = u.team AND f.agent = u.agent
WHERE u.kind = 'charge' AND u.usage_id = {usage_id:String}
ORDER BY u.workspace, u.team, u.agent, u.ledger_partition, u.ledger_offset
LIMIT 100
