-- Reads the trail for reports and Grafana, within limits. clickhouse-connect looks into system.settings when it connects.
-- Grafana's plugin sends a time limit of its own: it may, below ours.
CREATE ROLE IF NOT EXISTS spendfuse_reader SETTINGS
  readonly = 1, max_execution_time = 30 MIN 0 MAX 30 CHANGEABLE_IN_READONLY,
  max_memory_usage = 2147483648 CONST, max_result_bytes = 134217728 CONST;
GRANT SHOW, SELECT ON ${DB}.* TO spendfuse_reader;
GRANT SELECT ON system.settings TO spendfuse_reader;
