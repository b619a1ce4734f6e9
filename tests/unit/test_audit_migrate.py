"""Migrations: files in order, each statement whole, and a history that nobody changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from spendfuse.audit.migrate import MigrationError, load_migrations, plan, split_statements

if TYPE_CHECKING:
    from pathlib import Path


class Applied:
    """A database that has seen these migrations."""

    name = "trail"

    def __init__(self, *migrations: Any) -> None:
        self._rows = [(each.version, each.name, each.sha256) for each in migrations]

    def query(self, sql: str, _parameters: object = None) -> list[tuple[Any, ...]]:
        return [(int(bool(self._rows)),)] if "system.tables" in sql else self._rows


def files(directory: Path, **texts: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name.lstrip('m')}.sql").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("sql", "statements"),
    [
        ("SELECT 1;\nSELECT 2;\n", ["SELECT 1", "SELECT 2"]),
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT ';\n';\nSELECT 2;", ["SELECT ';\n'", "SELECT 2"]),
        ("SELECT 'it''s;\n' -- what's;\n;\nSELECT 2;", ["SELECT 'it''s;\n' -- what's;", "SELECT 2"]),
        ('SELECT `a;\n`, "b;\n" /* c;\n */;  \nSELECT 2;', ['SELECT `a;\n`, "b;\n" /* c;\n */', "SELECT 2"]),
        ("SELECT 1; SELECT 2;\n", ["SELECT 1; SELECT 2"]),
        ("SELECT 'a\\';\n';\r\nSELECT 2;\r\n", ["SELECT 'a\\';\n'", "SELECT 2"]),
        ("-- only a comment;\n\n", []),
        ("", []),
    ],
)
def test_a_statement_ends_with_a_semicolon_at_a_line_s_end_outside_quotes(sql: str, statements: list[str]) -> None:
    assert list(split_statements(sql)) == statements


def test_the_shipped_migrations_are_numbered_without_a_gap() -> None:
    migrations = load_migrations()
    assert [migration.version for migration in migrations] == list(range(1, len(migrations) + 1))
    assert all(list(split_statements(migration.sql)) for migration in migrations)


def test_what_has_not_been_run_is_planned_in_order(tmp_path: Path) -> None:
    migrations = load_migrations(files(tmp_path, m0002_b="B;", m0001_a="A;", m0003_c="C;"))
    assert plan(Applied(), migrations) == list(migrations)
    assert [str(each) for each in plan(Applied(migrations[0]), migrations)] == ["0002_b.sql", "0003_c.sql"]
    assert plan(Applied(*migrations), migrations) == []


def test_a_migration_changed_after_it_was_run_is_refused(tmp_path: Path) -> None:
    before = load_migrations(files(tmp_path, m0001_a="A;"))
    after = load_migrations(files(tmp_path, m0001_a="A2;"))
    with pytest.raises(MigrationError, match=r"0001_a\.sql was changed after it was run in database trail.*restore it"):
        plan(Applied(*before), after)


def test_a_database_that_has_seen_more_asks_for_a_newer_spendfuse(tmp_path: Path) -> None:
    both = load_migrations(files(tmp_path, m0001_a="A;", m0002_b="B;"))
    with pytest.raises(MigrationError, match=r"0002_b\.sql.*upgrade spendfuse"):
        plan(Applied(*both), both[:1])


def test_a_migration_slipped_in_before_one_that_was_run_is_refused(tmp_path: Path) -> None:
    all_three = load_migrations(files(tmp_path, m0001_a="A;", m0002_b="B;", m0003_c="C;"))
    with pytest.raises(MigrationError, match=r"0002_b\.sql comes before 0003"):
        plan(Applied(all_three[0], all_three[2]), all_three)


@pytest.mark.parametrize("name", ["1_a.sql", "0001-a.sql", "0001_A.sql"])
def test_a_file_with_another_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("SELECT 1;")
    with pytest.raises(MigrationError, match="rename it"):
        load_migrations(tmp_path)


def test_two_files_with_one_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="have the same number"):
        load_migrations(files(tmp_path, m0001_a="A;", m0001_b="B;"))
