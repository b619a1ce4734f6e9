-- Which calls were charged more than once? The same call id of the same agent, from another place of usage.v1: it came
-- again after the worker had forgotten it. What is remembered is charged once, and is a row of kind 'duplicate'.
-- Parameters: since, until DateTime('UTC') of event time, until exclusive; workspace, and of it the teams from team_from
-- to team_to and their agents from agent_from to agent_to, both included, agent_to '' = every agent: rows lie in this
-- order, so a part of them is read once and fits in memory. shard, shards UInt32: of one agent with too many calls only
-- ids that hash to shard of shards.
-- Units: cost_nanos in nano-units of currency: what was charged after the first time; times UTC.
SELECT
  workspace, team, agent, usage_id, currency,
  count() AS charges,
  min(occurred_at) AS at,
  max(recorded_at) AS charged_again_at,
  sum(cost_nanos) - argMin(cost_nanos, (recorded_at, ledger_partition, ledger_offset, src_partition, src_offset)) AS cost_nanos
FROM usage_events
WHERE kind = 'charge' AND workspace = {workspace:String}
  AND team >= {team_from:String} AND team <= {team_to:String}
  AND ({agent_to:String} = '' OR (agent >= {agent_from:String} AND agent <= {agent_to:String}))
  AND occurred_at >= {since:DateTime('UTC')} AND occurred_at < {until:DateTime('UTC')}
  AND cityHash64(team, agent, usage_id) IN (
    SELECT call FROM (
      SELECT cityHash64(team, agent, usage_id) AS call
      FROM usage_events
      WHERE kind = 'charge' AND workspace = {workspace:String}
        AND team >= {team_from:String} AND team <= {team_to:String}
        AND ({agent_to:String} = '' OR (agent >= {agent_from:String} AND agent <= {agent_to:String}))
        AND occurred_at >= {since:DateTime('UTC')} AND occurred_at < {until:DateTime('UTC')}
        AND ({shards:UInt32} = 1 OR call % {shards:UInt32} = {shard:UInt32})
    )
    GROUP BY call HAVING count() > 1
  )
GROUP BY workspace, team, agent, usage_id, currency
HAVING charges > 1
ORDER BY workspace, currency, cost_nanos DESC, team, agent, usage_id
LIMIT 1000
