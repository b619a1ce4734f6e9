-- How did a run's context grow? Each of its calls in order, as it was charged (corrections are of the sums); a root run's whole tree, any other run alone.
-- Asked twice, by root run and by run: with OR, neither leaves anything out. Where its calls lie is asked of the sums by
-- run first (projection by_run): the hours of its agents are few.
-- Parameters: workspace String ('' = all); run String; turns UInt32, the most rows wanted.
-- Units: tokens; context_tokens is input, cached or not; cost_nanos in nano-units of currency; time UTC.
SELECT
  row_number() OVER (ORDER BY occurred_at, src_topic, src_partition, src_offset, src_index) AS turn,
  occurred_at AS at,
  workspace, team, agent, run, model,
  input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens AS context_tokens,
  cache_read_tokens, output_tokens, currency, cost_nanos
FROM (
  SELECT * FROM usage_events
  WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND root_run = {run:String}
    AND (team, agent, toStartOfHour(occurred_at)) IN (
      SELECT team, agent, toStartOfHour(occurred_at) FROM usage_events
      WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND root_run = {run:String}
      GROUP BY team, agent, toStartOfHour(occurred_at)
    )
  UNION ALL
  SELECT * FROM usage_events
  WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND run = {run:String}
    AND root_run != {run:String}
    AND (team, agent, toStartOfHour(occurred_at)) IN (
      SELECT team, agent, toStartOfHour(occurred_at) FROM usage_events
      WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String}) AND run = {run:String} AND root_run != {run:String}
      GROUP BY team, agent, toStartOfHour(occurred_at)
    )
)
ORDER BY turn
LIMIT {turns:UInt32}
