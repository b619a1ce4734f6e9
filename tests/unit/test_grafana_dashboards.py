"""The dashboard as committed: what Grafana would trip over, looked for before Grafana sees it."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from spendfuse.grafana import DASHBOARDS, dashboard, panels
from spendfuse.grafana.files import PanelSqlError, load, queries_directory
from spendfuse.grafana.generate import main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "grafana"
BOARDS = sorted((DEPLOY / "dashboards").glob("*.json"))
BOARD = pytest.mark.parametrize(
    "board", [json.loads(path.read_text()) for path in BOARDS], ids=[p.stem for p in BOARDS]
)
# The variables a panel may name besides its own: Grafana's, and the two that are not of a query.
OURS = {"datasource", "workspace", "team", "agent"}


def texts_of(board: Any) -> Iterator[str]:
    """Every statement of a dashboard."""
    if isinstance(board, dict):
        for key, value in board.items():
            if key == "rawSql":
                yield value
            yield from texts_of(value)
    elif isinstance(board, list):
        for value in board:
            yield from texts_of(value)


def test_the_committed_json_is_what_its_source_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "wallet.json is not what its source says: run make generate" in capsys.readouterr().err
    assert main(["--root", str(tmp_path)]) == 0
    assert (tmp_path / "deploy/grafana/dashboards/wallet.json").read_bytes() == (
        DEPLOY / "dashboards/wallet.json"
    ).read_bytes()
    assert [path.stem for path in BOARDS] == sorted(DASHBOARDS)


@BOARD
def test_ids_are_unique_and_nothing_overlaps(board: dict[str, Any]) -> None:
    everything = board["panels"]
    assert len({each["id"] for each in everything}) == len(everything)
    for each in everything:
        at = each["gridPos"]
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24
        assert at["w"] > 0 < at["h"]
    for one, other in combinations((each["gridPos"] for each in everything), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@BOARD
def test_every_panel_is_described_has_a_unit_and_asks_the_chosen_datasource(board: dict[str, Any]) -> None:
    drawn = [each for each in board["panels"] if each["type"] != "row"]
    assert len(drawn) == len(panels())
    for each in drawn:
        assert each["description"].endswith((".", "!")), each["title"]
        assert each["fieldConfig"]["defaults"]["unit"]
        (target,) = each["targets"]
        for source in (each["datasource"], target["datasource"]):
            assert source == {"type": "grafana-clickhouse-datasource", "uid": "${datasource}"}
        assert isinstance(target["format"], int)
        assert target["queryType"] == ("timeseries" if target["format"] == 0 else "table")
    assert not board["editable"]
    assert board["timezone"] == "utc"


@BOARD
def test_a_variable_reaches_sql_quoted_or_not_at_all(board: dict[str, Any]) -> None:
    names = {each["name"] for each in board["templating"]["list"]}
    assert names == OURS
    statements = list(texts_of(board))
    assert len(statements) == len(panels()) + len(names) - 1 + 1
    for sql in statements:
        plain = re.sub(r"\$__conditionalAll\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*), \$(team|agent)\)", r"\1", sql)
        assert "$__conditionalAll" not in plain, "a condition in a form this test cannot read"
        for found in re.findall(r"\$(?!__)\S+", plain):
            assert re.match(r"\$\{(workspace|team|agent):singlequote\}", found), found


@BOARD
def test_conditions_can_be_read_by_the_plugin_which_does_not_see_quotes(board: dict[str, Any]) -> None:
    # Its front end counts parentheses and commas without looking at quotes or brackets (CHDatasource.ts).
    for sql in texts_of(board):
        for quoted in re.findall(r"'[^']*'", sql):
            assert not set(quoted) & set("(),$"), quoted


@BOARD
def test_links_lead_to_dashboards_that_exist(board: dict[str, Any]) -> None:
    uids = {dashboard(name)["uid"] for name in DASHBOARDS}
    linked = set(re.findall(r"/d/([\w-]+)", json.dumps(board)))
    assert linked
    assert linked <= uids


def test_each_statement_is_one_file_and_each_file_is_asked() -> None:
    named = {sql for name in DASHBOARDS for sql in texts_of(dashboard(name))}
    files = [entry.name.removesuffix(".sql") for entry in queries_directory().iterdir() if entry.name.endswith(".sql")]
    assert {load(name).statement for name in files} == named
    assert len(files) == len(named)


@pytest.mark.parametrize("name", ["nothing", "../wallet", "a" * 65, ""])
def test_a_file_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(PanelSqlError, match="there is no sql/queries/grafana/"):
        load(name)


def test_the_provisioned_datasource_reads_with_the_reader_and_takes_its_password_from_the_environment() -> None:
    (source,) = yaml.safe_load((DEPLOY / "provisioning/datasources/spendfuse.yaml").read_text())["datasources"]
    assert source["type"] == "grafana-clickhouse-datasource"
    assert source["jsonData"]["username"] == "grafana_reader"
    assert source["jsonData"]["defaultDatabase"] == "spendfuse"
    assert source["jsonData"]["protocol"] == "native"
    # Grafana's interpolation knows no defaults.
    assert source["secureJsonData"] == {"password": "${CLICKHOUSE_GRAFANA_PASSWORD}"}
    assert not source["editable"]


def test_the_provisioned_folder_is_the_one_compose_mounts() -> None:
    (provider,) = yaml.safe_load((DEPLOY / "provisioning/dashboards/spendfuse.yaml").read_text())["providers"]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    mounts = dict(volume.rsplit(":", 1)[0].split(":") for volume in grafana["volumes"] if volume.startswith("./"))
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "dashboards" / home.removeprefix(provider["options"]["path"] + "/")).is_file()
