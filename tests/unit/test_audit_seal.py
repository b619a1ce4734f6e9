"""Seals: the trees of RFC 6962, paths that prove one leaf and no other, and leaves that hold every column."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_trails import entries, messages, sealed
from spendfuse.audit import seal
from spendfuse.audit.files import query_text, sql_directory
from spendfuse.audit.rows import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

# RFC 6962's own test vectors, as certificate-transparency implementations carry them.
INPUTS = [
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def rfc_leaves(count: int) -> list[bytes]:
    return [hashlib.sha256(b"\0" + bytes.fromhex(text)).digest() for text in INPUTS[:count]]


def split_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962 as it is written there: split at the largest power of two below the size."""
    if len(leaves) == 1:
        return leaves[0]
    at = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + split_root(leaves[:at]) + split_root(leaves[at:])).digest()


@pytest.mark.parametrize("count", range(1, 9))
def test_roots_are_those_of_the_rfc(count: int) -> None:
    assert seal.merkle_root(rfc_leaves(count)).hex() == ROOTS[count - 1]


def test_the_root_of_nothing_is_the_hash_of_nothing() -> None:
    assert seal.merkle_root([]).hex() == seal.EMPTY_ROOT == hashlib.sha256(b"").hexdigest()


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=70))
def test_the_tree_is_the_one_that_splits_at_powers_of_two(leaves: list[bytes]) -> None:
    assert seal.merkle_root(leaves) == split_root(leaves)


@given(st.integers(1, 70), st.data())
def test_a_path_leads_from_its_leaf_to_the_root_and_from_nothing_else(size: int, data: st.DataObject) -> None:
    leaves = [hashlib.sha256(bytes([nth])).digest() for nth in range(size)]
    index, root = data.draw(st.integers(0, size - 1)), seal.merkle_root(leaves)
    path = seal.audit_path(leaves, index)
    assert seal.root_of_path(leaves[index], index, size, path) == root
    assert seal.root_of_path(hashlib.sha256(b"other").digest(), index, size, path) != root
    for other in range(size):
        if other != index:
            assert seal.root_of_path(leaves[index], other, size, path) != root
    assert seal.root_of_path(leaves[index], index, size, [*path, root]) is None
    if path:
        assert seal.root_of_path(leaves[index], index, size, path[:-1]) is None


def test_every_column_of_the_evidence_is_in_its_leaf() -> None:
    """A column that a migration adds and no leaf holds could be changed unseen."""
    text = "\n".join(
        entry.read_text(encoding="utf-8")
        for entry in sorted((sql_directory() / "migrations").iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".sql")
    )
    for table, columns in seal.LEAF_COLUMNS.items():
        create = re.search(rf"CREATE TABLE IF NOT EXISTS \$\{{DB\}}\.{table} \((.*?)\n\) ENGINE", text, re.DOTALL)
        assert create is not None
        lines = [line.strip() for line in create[1].splitlines() if line.strip()]
        stored = {
            line.split()[0]
            for line in lines
            if " ALIAS " not in line and not line.startswith(("CONSTRAINT", "INDEX", "PROJECTION", "--"))
        }
        added = re.findall(rf"ALTER TABLE \$\{{DB\}}\.{table}\s+ADD COLUMN IF NOT EXISTS (\w+)([^;]*);", text)
        computed = {name for name, rest in added if "MATERIALIZED" in rest or "ALIAS" in rest}
        stored |= {name for name, _ in added} - computed
        assert {name for name, _ in columns} == stored - seal.NOT_SEALED, table
        assert all(f"{name} != " in query_text("verify_leaves") for name in computed), "held against what it is made of"


def test_the_database_is_asked_for_the_same_leaves() -> None:
    text = query_text("verify_leaves")
    for table in seal.LEAF_COLUMNS:
        assert seal.leaf_sql(table) in text
    assert " ".join(seal.HEADER_SQL.split()) in " ".join(query_text("verify_chain").replace("\n    )", ")").split())


def test_any_change_of_any_value_changes_the_leaf() -> None:
    for batch in sealed(0, messages(0), rows_max=5_000):
        for table in batch.tables:
            before = seal.leaves(table)
            for name, kind in seal.LEAF_COLUMNS[table.name]:
                other = {
                    "s": lambda value: value + "x", "e": lambda value: value + "x",
                    "map": lambda value: {**value, "k": "v"},
                    "i64s": lambda value: [*value, 0], "i64?": lambda value: 1 if value is None else None,
                    "us?": lambda value: 1 if value is None else None,
                }.get(kind, lambda value: value + 1)  # fmt: skip
                changed = {**table.columns, name: [other(value) for value in table.columns[name]]}
                after = seal.leaves(Table(table.name, changed))
                assert not set(before) & set(after), (table.name, name)


def test_neighbours_that_read_alike_together_have_other_leaves() -> None:
    (batch,) = sealed(0, messages(0)[:1])
    (table,) = (table for table in batch.tables if table.name == "usage_events")
    one = {**table.columns, "team": ["ab"] * table.rows, "agent": ["c"] * table.rows}
    two = {**table.columns, "team": ["a"] * table.rows, "agent": ["bc"] * table.rows}
    assert seal.leaves(Table("usage_events", one)) != seal.leaves(Table("usage_events", two))


def test_a_chain_holds_every_batch_and_is_the_same_however_often_it_is_formed() -> None:
    first, again = list(sealed(0, messages(0))), list(sealed(0, messages(0)))
    assert [batch.header for batch in first] == [batch.header for batch in again]
    seals = [batch.header.seal for batch in first]
    assert all(each is not None for each in seals)
    assert [each.prev_hash for each in seals if each] == [seal.GENESIS, *(b.header.link for b in first[:-1])]
    assert sum(batch.header.rows for batch in first) == len(entries(0)) + 1
    assert {batch.token(table.name) for batch in first for table in batch.tables} == {b.header.link for b in first}
