"""Which partition a name lives on, the same in every process and for the life of the topics."""

from zlib import crc32


def partition_of(name: str, partitions: int) -> int:
    """Return the partition of an agent path, a scope or a topic name."""
    return crc32(name.encode()) % partitions


def state_key(partition: int, name: str) -> bytes:
    """Return a table key; the partition is part of it, since Faust's memory outlives an assignment."""
    return f"{partition}/{name}".encode()


def split_state_key(key: bytes) -> tuple[int, str]:
    """Return (partition, name) of a table key."""
    partition, _, name = key.decode().partition("/")
    return int(partition), name
