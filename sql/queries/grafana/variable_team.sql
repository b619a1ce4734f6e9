-- The teams of the workspace.
SELECT DISTINCT team FROM spend_1d WHERE workspace = ${workspace:singlequote} ORDER BY team
