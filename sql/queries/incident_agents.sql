-- Who was under one halt, when did each stop, and what did each still spend? One row for each agent that answered or spent.
-- Parameters: id String, the halt's command id; scope String, its scope; since, until DateTime64(6,'UTC'): its order and
-- its end, both exclusive; limit UInt32, those that spent most first.
-- Units: lag_us microseconds from the crossing usage's event time to the agent's first enforcement, by its guard's clock;
-- nanos_after in nano-units by currency; times UTC.
-- in_flight_at_stop, tokens_since: what the agent's guards said of calls in flight when they refused the next, and of tokens
-- that ended under them after the halt had arrived; NULL when none of them said so.
-- proved_by: ids of the enrolled guard keys that signed the agent's word that it stopped; '' when it is only claimed.
SELECT agent, max(received) AS received_at, max(enforced) AS enforced_at, max(lag) AS lag_us, max(guard_count) AS guards,
  arrayStringConcat(arraySort(groupUniqArrayIf(kid, kid != '')), ', ') AS proved_by,
  sum(in_flight) AS in_flight_at_stop, sum(since) AS tokens_since,
  sum(calls) AS calls_after, sum(tokens) AS tokens_after, sumMap(nanos) AS nanos_after, max(last_at) AS last_spent_at
FROM (
  SELECT toString(agent) AS agent, received_at AS received, enforced_at AS enforced, halt_lag_us AS lag,
    guards AS guard_count, toUInt64(0) AS calls, toInt64(0) AS tokens, CAST(map(), 'Map(String, Int64)') AS nanos,
    CAST(NULL, 'Nullable(DateTime64(6, \'UTC\'))') AS last_at, '' AS kid,
    CAST(NULL, 'Nullable(UInt64)') AS in_flight, CAST(NULL, 'Nullable(UInt64)') AS since
  FROM commands_acked
  WHERE command_id = {id:String} AND agent != ''
  UNION ALL
  SELECT concat('agent:', workspace, '/', team, '/', agent) AS agent, NULL, NULL, NULL, 0, sum(net_charges.calls),
    sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens),
    sumMap(map(toString(currency), cost_nanos)), toNullable(max(occurred_at)), '', NULL, NULL
  FROM net_charges
  WHERE occurred_at > {since:DateTime64(6, 'UTC')} AND occurred_at < {until:DateTime64(6, 'UTC')}
    AND has([
      concat('workspace:', workspace),
      concat('team:', workspace, '/', team),
      concat('agent:', workspace, '/', team, '/', net_charges.agent),
      concat('run:', workspace, '/', root_run)
    ], {scope:String})
  GROUP BY agent
  UNION ALL
  SELECT toString(a.agent), NULL, NULL, NULL, 0, 0, 0, CAST(map(), 'Map(String, Int64)'), NULL,
    JSONExtractString(p.data, 'kid') AS by_key,
    max(JSONExtract(p.data, 'calls_in_flight', 'Nullable(UInt64)')),
    max(JSONExtract(p.data, 'tokens_since', 'Nullable(UInt64)'))
  FROM acks AS a
  INNER JOIN ledger_events AS p ON p.src_topic = a.src_topic AND p.src_partition = a.src_partition
    AND p.src_offset = a.src_offset
  WHERE a.command_id = {id:String} AND a.state = 'enforced' AND p.kind IN ('proof', 'claim')
  GROUP BY a.agent, a.guard, by_key
)
GROUP BY agent
ORDER BY calls_after DESC, agent
LIMIT {limit:UInt32}
