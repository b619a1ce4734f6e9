-- The workspaces that have spent.
SELECT DISTINCT workspace FROM spend_1d ORDER BY workspace
