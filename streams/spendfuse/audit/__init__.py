"""The ClickHouse shell: the ledger written into tables once and exactly, and read again over HTTP."""
