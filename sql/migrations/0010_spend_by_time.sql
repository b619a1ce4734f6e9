-- Rollups in the order of time as well, and spend by run: what a dashboard over 50 million rows reads instead of them.
--
-- The minutes and hours lie ordered by agent, which answers "this agent, always"; a dashboard asks "everybody, today", and
-- would read a month for it. by_time holds them again ordered by time. by_run sums charges by run, agent and hour: the
-- only rollup that knows runs. Both are projections, parts of what they order or sum: nothing is inserted twice, a batch
-- that is repeated changes nothing in them either, and filling them may be cut short, repeated, or done from two places.
-- A rollup's rows are added up when parts are merged, and its projection is then made anew (`rebuild`).
ALTER TABLE ${DB}.spend_1m MODIFY SETTING deduplicate_merge_projection_mode = 'rebuild';
ALTER TABLE ${DB}.spend_1h MODIFY SETTING deduplicate_merge_projection_mode = 'rebuild';
ALTER TABLE ${DB}.spend_1m ADD PROJECTION IF NOT EXISTS by_time (
  SELECT * ORDER BY workspace, bucket, team, agent, workflow, provider, model, currency
);
ALTER TABLE ${DB}.spend_1h ADD PROJECTION IF NOT EXISTS by_time (
  SELECT * ORDER BY workspace, bucket, team, agent, workflow, provider, model, currency
);
ALTER TABLE ${DB}.usage_events ADD PROJECTION IF NOT EXISTS by_run (
  SELECT kind, workspace, currency, root_run, run, team, agent, toStartOfHour(occurred_at),
    count(), sum(input_tokens), sum(cache_read_tokens), sum(cache_write_5m_tokens), sum(cache_write_1h_tokens),
    sum(output_tokens), sum(cost_nanos), max(occurred_at)
  GROUP BY kind, workspace, currency, root_run, run, team, agent, toStartOfHour(occurred_at)
);
ALTER TABLE ${DB}.spend_1m MATERIALIZE PROJECTION by_time;
ALTER TABLE ${DB}.spend_1h MATERIALIZE PROJECTION by_time;
ALTER TABLE ${DB}.usage_events MATERIALIZE PROJECTION by_run;

-- spend_over(since, until): the minutes from since to until, both included, as the fewest rows that add up to them: whole
-- UTC days from spend_1d, hours from spend_1h, the rest from spend_1m. Bounds are seconds since 1970 and not instants,
-- which a server would read in a time zone of its own.
CREATE VIEW IF NOT EXISTS ${DB}.spend_over AS
WITH
  toDateTime({since:UInt32}, 'UTC') AS from_minute, toDateTime({until:UInt32} + 1, 'UTC') AS to_minute,
  toStartOfHour(from_minute + 3599) AS from_hour, toStartOfHour(to_minute) AS to_hour,
  toStartOfDay(from_minute + 86399) AS from_day, toStartOfDay(to_minute) AS to_day
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls, input_tokens,
  cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos
FROM ${DB}.spend_1m
WHERE bucket >= from_minute AND bucket < to_minute AND (bucket < from_hour OR bucket >= to_hour)
UNION ALL
WITH
  toDateTime({since:UInt32}, 'UTC') AS from_minute, toDateTime({until:UInt32} + 1, 'UTC') AS to_minute,
  toStartOfHour(from_minute + 3599) AS from_hour, toStartOfHour(to_minute) AS to_hour,
  toStartOfDay(from_minute + 86399) AS from_day, toStartOfDay(to_minute) AS to_day
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls, input_tokens,
  cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos
FROM ${DB}.spend_1h
WHERE bucket >= from_hour AND bucket < to_hour AND (bucket < from_day OR bucket >= to_day)
UNION ALL
WITH
  toDateTime({since:UInt32}, 'UTC') AS from_minute, toDateTime({until:UInt32} + 1, 'UTC') AS to_minute,
  toStartOfDay(from_minute + 86399) AS from_day, toStartOfDay(to_minute) AS to_day
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls, input_tokens,
  cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos
FROM ${DB}.spend_1d
WHERE bucket >= from_day AND bucket < to_day;

-- spend_by(step, since, until): the buckets of a graph with one point each `step` seconds, from whole points at since to
-- the minute of until: hours where the points are of whole hours, else minutes.
CREATE VIEW IF NOT EXISTS ${DB}.spend_by AS
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls, input_tokens,
  cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos
FROM ${DB}.spend_1m
WHERE {step:UInt32} % 3600 != 0 AND bucket >= toDateTime(intDiv({since:UInt32}, {step:UInt32}) * {step:UInt32}, 'UTC')
  AND bucket <= toDateTime({until:UInt32}, 'UTC')
UNION ALL
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls, input_tokens,
  cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos
FROM ${DB}.spend_1h
WHERE {step:UInt32} % 3600 = 0 AND bucket >= toDateTime(intDiv({since:UInt32}, {step:UInt32}) * {step:UInt32}, 'UTC')
  AND bucket <= toDateTime({until:UInt32}, 'UTC');
