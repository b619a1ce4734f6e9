-- Makes what the migrations make. The materialized views run as their maker, who must be able to read and insert.
CREATE ROLE IF NOT EXISTS spendfuse_migrator;
GRANT SHOW, SELECT, INSERT, CREATE DATABASE, CREATE TABLE, CREATE VIEW, DROP VIEW, ALTER ADD COLUMN, ALTER ADD INDEX,
  ALTER ADD PROJECTION, ALTER MATERIALIZE PROJECTION ON ${DB}.* TO spendfuse_migrator;
GRANT ALTER SETTINGS ON ${DB}.spend_1m TO spendfuse_migrator;
GRANT ALTER SETTINGS ON ${DB}.spend_1h TO spendfuse_migrator;
GRANT SHOW, SELECT ON system.* TO spendfuse_migrator;
