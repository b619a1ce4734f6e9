-- On which models was it spent, and how well did their caches work?
-- Parameters: workspace String; since, until DateTime64(6,'UTC') of event time, until exclusive.
-- Units: tokens; cost_nanos in nano-units of currency; cache_hit_bp in 1/10,000 of all input.
SELECT
  provider, model, tier, currency,
  sum(calls) AS calls,
  countIf(priced_by = 'ceiling') AS calls_without_price,
  sum(input_tokens) AS input_tokens,
  sum(cache_read_tokens) AS cache_read_tokens,
  sum(cache_write_5m_tokens + cache_write_1h_tokens) AS cache_write_tokens,
  sum(output_tokens) AS output_tokens,
  sum(cost_nanos) AS cost_nanos,
  toUInt32(intDivOrZero(10000 * sum(e.cache_read_tokens),
    sum(e.input_tokens + e.cache_read_tokens + e.cache_write_5m_tokens + e.cache_write_1h_tokens))) AS cache_hit_bp
FROM net_charges AS e
WHERE workspace = {workspace:String}
  AND occurred_at >= {since:DateTime64(6, 'UTC')} AND occurred_at < {until:DateTime64(6, 'UTC')}
GROUP BY provider, model, tier, currency
ORDER BY cost_nanos DESC, provider, model, tier
