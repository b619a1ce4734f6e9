-- Whose calls are looked through for duplicates, and how many are there? In the order rows lie in, and from the rows
-- themselves: a rollup that lacks an agent must not hide its calls.
-- Parameters: workspace String ('' = all); since, until DateTime('UTC') of event time, until exclusive.
SELECT workspace, team, agent, count() AS calls
FROM usage_events
WHERE kind = 'charge' AND ({workspace:String} = '' OR workspace = {workspace:String})
  AND occurred_at >= {since:DateTime('UTC')} AND occurred_at < {until:DateTime('UTC')}
GROUP BY workspace, team, agent
ORDER BY workspace, team, agent
