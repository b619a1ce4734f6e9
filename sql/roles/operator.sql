-- Drops months of usage whose retention has ended, and replaces the rollups by what the rows add up to. Nothing else:
-- headers, commands, acks, alerts and ledger events cannot be touched. Grant it for the run, and revoke it.
CREATE ROLE IF NOT EXISTS spendfuse_operator;
GRANT SHOW, SELECT ON ${DB}.* TO spendfuse_operator;
GRANT SHOW, SELECT ON system.* TO spendfuse_operator;
GRANT ALTER DELETE ON ${DB}.usage_events TO spendfuse_operator;
GRANT INSERT, ALTER DELETE ON ${DB}.spend_1m TO spendfuse_operator;
GRANT INSERT, ALTER DELETE ON ${DB}.spend_1h TO spendfuse_operator;
GRANT INSERT, ALTER DELETE ON ${DB}.spend_1d TO spendfuse_operator;
GRANT CREATE TABLE, DROP TABLE, INSERT, ALTER DELETE ON ${DB}.spend_1m_rebuild TO spendfuse_operator;
GRANT CREATE TABLE, DROP TABLE, INSERT, ALTER DELETE ON ${DB}.spend_1h_rebuild TO spendfuse_operator;
GRANT CREATE TABLE, DROP TABLE, INSERT, ALTER DELETE ON ${DB}.spend_1d_rebuild TO spendfuse_operator;
