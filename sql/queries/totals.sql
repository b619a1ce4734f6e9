-- What did each agent use and cost, exactly, as corrected? From the charges themselves, not from a rollup.
-- Parameters: workspace String ('' = all).
-- Units: tokens; cost_nanos in nano-units of currency.
SELECT
  workspace, team, agent, currency,
  sum(calls) AS calls,
  sum(input_tokens) AS input_tokens,
  sum(cache_read_tokens) AS cache_read_tokens,
  sum(cache_write_5m_tokens) AS cache_write_5m_tokens,
  sum(cache_write_1h_tokens) AS cache_write_1h_tokens,
  sum(output_tokens) AS output_tokens,
  sum(reasoning_tokens) AS reasoning_tokens,
  sum(cost_nanos) AS cost_nanos
FROM net_charges
WHERE ({workspace:String} = '' OR workspace = {workspace:String})
GROUP BY workspace, team, agent, currency
ORDER BY workspace, team, agent, currency
