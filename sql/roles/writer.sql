-- Appends to the trail, and reads where it stands.
CREATE ROLE IF NOT EXISTS spendfuse_writer SETTINGS async_insert = 0;
GRANT SHOW, SELECT, INSERT ON ${DB}.* TO spendfuse_writer;
GRANT SHOW, SELECT ON system.* TO spendfuse_writer;
