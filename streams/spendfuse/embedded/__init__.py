"""A Kafka-compatible broker, a ClickHouse engine and the processes they live in, without Docker."""
