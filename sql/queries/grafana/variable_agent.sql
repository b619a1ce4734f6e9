-- The agents of the teams.
SELECT DISTINCT agent FROM spend_1d
WHERE workspace = ${workspace:singlequote} AND $__conditionalAll(team IN (${team:singlequote}), $team)
ORDER BY agent
