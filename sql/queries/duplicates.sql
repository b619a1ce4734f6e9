-- Which calls were charged more than once? The same call id of the same agent, from another place of usage.v1: it came
-- again after the worker had forgotten it. What is remembered is charged once, and is a row of kind 'duplicate'.
-- Parameters: workspace String ('' = all); since, until DateTime('UTC') of event time, until exclusive; shard, shards
-- UInt32: only ids that hash to shard of shards, so that an answer over many rows fits in memory.
-- Units: cost_nanos in nano-units of currency: what was charged after the first time; times UTC.
SELECT
  workspace, team, agent, usage_id, currency,
  count() AS charges,
  min(occurred_at) AS at,
  max(recorded_at) AS charged_again_at,
  sum(cost_nanos) - argMin(cost_nanos, (recorded_at, ledger_partition, ledger_offset, src_partition, src_offset)) AS cost_nanos
FROM usage_events
WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String})
  AND occurred_at >= {since:DateTime('UTC')} AND occurred_at < {until:DateTime('UTC')}
  AND cityHash64(workspace, team, agent, usage_id) IN (
    SELECT call FROM (
      SELECT cityHash64(workspace, team, agent, usage_id) AS call
      FROM usage_events
      WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String})
        AND occurred_at >= {since:DateTime('UTC')} AND occurred_at < {until:DateTime('UTC')}
        AND call % {shards:UInt32} = {shard:UInt32}
    )
    GROUP BY call HAVING count() > 1
  )
GROUP BY workspace, team, agent, usage_id, currency
HAVING charges > 1
ORDER BY workspace, currency, cost_nanos DESC, team, agent, usage_id
LIMIT 1000
