-- Degrade, halt and resume commands, as marks on every graph.
SELECT issued_at AS time, concat(toString(action), ' ', scope) AS title, message AS text, toString(action) AS tags
FROM commands
WHERE decided_only = 0 AND action != 'warn' AND workspace = ${workspace:singlequote} AND $__timeFilter_ms(issued_at)
  AND $__conditionalAll((scope_kind IN ('workspace', 'run') OR splitByChar('/', scope)[2] IN (${team:singlequote})), $team)
ORDER BY time
LIMIT 500
