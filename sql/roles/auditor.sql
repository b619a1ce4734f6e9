-- Verifies the trail, which reads all of it, and looks for who touched it: mutations, parts and, where kept, queries.
CREATE ROLE IF NOT EXISTS spendfuse_auditor SETTINGS readonly = 1;
GRANT SHOW, SELECT ON ${DB}.* TO spendfuse_auditor;
GRANT SHOW, SELECT ON system.* TO spendfuse_auditor;
