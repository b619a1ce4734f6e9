"""The endpoint's address on disk: found by its readers, its token by nobody else."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from spendfuse.audit.address import Address, AuditNotRunningError, read_address, remove_address
from spendfuse.audit.files import SqlMissingError, query_text

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS = Address(url="http://127.0.0.1:8124", user="reader", database="spendfuse", token=SecretStr("s3cret"))


def test_an_address_is_read_as_it_was_written(tmp_path: Path) -> None:
    ADDRESS.write(tmp_path)
    assert read_address(tmp_path) == ADDRESS


def test_the_token_is_in_a_file_of_its_own_that_only_its_owner_reads(tmp_path: Path) -> None:
    ADDRESS.write(tmp_path)
    ADDRESS.write(tmp_path)  # over an older one
    assert "s3cret" not in (tmp_path / "endpoint.json").read_text()
    assert stat.S_IMODE((tmp_path / "endpoint.token").stat().st_mode) == 0o600
    assert "s3cret" not in repr(ADDRESS)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"url": 1}'])
def test_a_broken_address_says_what_to_do(tmp_path: Path, text: str) -> None:
    ADDRESS.write(tmp_path)
    (tmp_path / "endpoint.json").write_text(text)
    with pytest.raises(AuditNotRunningError, match="restart the audit process"):
        read_address(tmp_path)


def test_no_address_says_how_to_start_an_audit(tmp_path: Path) -> None:
    ADDRESS.write(tmp_path)
    remove_address(tmp_path)
    remove_address(tmp_path)
    with pytest.raises(AuditNotRunningError, match=r"python -m spendfuse\.audit"):
        read_address(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "../migrations/0001_database", "", "totals.sql"])
def test_a_query_that_is_not_there_names_those_that_are(name: str) -> None:
    with pytest.raises(SqlMissingError, match=r"there are agents, .*totals, .*wallet"):
        query_text(name)
