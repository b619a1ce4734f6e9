"""Grafana's classic dashboard JSON, from rows and panels.

Our own 150 lines and not grafana-foundation-sdk 0.0.21: its classic builder is deprecated, its ClickHouse query has to
be taught to it, and five things must be patched after it has encoded (ids of panels and rows, where annotations and
links are shown, the annotations' SQL). Written after Grafana's dashboard JSON model and the plugin's own dashboards.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from spendfuse.grafana.macros import POINTS_MAX
from spendfuse.grafana.spec import TABLE, TIME_SERIES, Annotation, Panel, Row, Variable

PLUGIN: Final = "grafana-clickhouse-datasource"
PLUGIN_VERSION: Final = "4.20.0"
SCHEMA_VERSION: Final = 39
"""That of the plugin's own dashboards; Grafana brings it up to date when it loads one."""
COLUMNS: Final = 24
ROW_HEIGHT: Final = 1
ALL_VALUE: Final = {"text": "All", "value": "$__all"}
Json = dict[str, Any]


def build(
    uid: str,
    title: str,
    description: str,
    elements: Sequence[Row | Panel],
    variables: Sequence[Variable],
    annotations: Sequence[Annotation],
) -> Json:
    """Return a dashboard as Grafana reads it; panels flow from left to right, a row begins a new line."""
    return {
        "annotations": {"list": [_built_in_annotation(), *(_annotation(each) for each in annotations)]},
        "description": description,
        "editable": False,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "id": None,
        "links": [_sibling_link()],
        "liveNow": False,
        "panels": _flow(elements),
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["spendfuse"],
        "templating": {"list": [_datasource_variable(), *(_variable(each) for each in variables)]},
        "time": {"from": "now-24h", "to": "now"},
        "timepicker": {},
        "timezone": "utc",
        "title": title,
        "uid": uid,
        "version": 1,
        "weekStart": "",
    }


def _flow(elements: Sequence[Row | Panel]) -> list[Json]:
    placed: list[Json] = []
    x = y = line = 0
    for element in elements:
        if isinstance(element, Row) or x + element.width > COLUMNS:
            x, y, line = 0, y + line, 0
        if isinstance(element, Row):
            placed.append(_row(element, y))
            y += ROW_HEIGHT
        else:
            placed.append(_panel(element, {"x": x, "y": y, "w": element.width, "h": element.height}))
            x, line = x + element.width, max(line, element.height)
    return placed


def _row(row: Row, y: int) -> Json:
    position = {"x": 0, "y": y, "w": COLUMNS, "h": ROW_HEIGHT}
    return {"type": "row", "id": row.id, "title": row.title, "collapsed": False, "panels": [], "gridPos": position}


def _panel(panel: Panel, position: Mapping[str, int]) -> Json:
    described: Json = {
        "type": panel.viz,
        "id": panel.id,
        "title": panel.title,
        "description": panel.description,
        "datasource": _datasource(),
        "gridPos": dict(position),
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "color": {"mode": "palette-classic" if panel.viz == "timeseries" else "thresholds"},
                "thresholds": _thresholds(panel.thresholds),
                "custom": _custom(panel),
                **panel.field_config,
            },
            "overrides": [_override(name, properties) for name, properties in panel.columns.items()],
        },
        "options": {**_options(panel), **panel.options},
        "targets": [_target(panel)],
    }
    if panel.least_interval:
        described["interval"] = panel.least_interval
        described["maxDataPoints"] = POINTS_MAX
    return described


def _target(panel: Panel) -> Json:
    return {
        "datasource": _datasource(),
        "editorType": "sql",
        "format": panel.format,
        "meta": {"timezone": "UTC"},
        "pluginVersion": PLUGIN_VERSION,
        "queryType": "timeseries" if panel.format == TIME_SERIES else "table",
        "rawSql": panel.sql,
        "refId": "A",
    }


def _options(panel: Panel) -> Json:
    # A bar gauge without `values` folds its table into one bar.
    reduce = {"calcs": [panel.calc], "fields": "", "values": panel.viz == "bargauge"}
    match panel.viz:
        case "stat":
            graph = "area" if panel.format == TIME_SERIES else "none"
            return {
                "reduceOptions": reduce, "colorMode": "value", "graphMode": graph, "textMode": "auto",
                "justifyMode": "auto", "orientation": "auto", "wideLayout": True,
            }  # fmt: skip
        case "bargauge":
            return {
                "reduceOptions": reduce, "displayMode": "gradient", "orientation": "horizontal", "namePlacement": "top",
                "showUnfilled": True, "sizing": "auto", "valueMode": "color",
            }  # fmt: skip
        case "timeseries":
            return {
                "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["sum", "max"]},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        case "table":
            return {"showHeader": True, "cellHeight": "sm"}


def _custom(panel: Panel) -> Json:
    if panel.viz == "timeseries":
        return {
            "drawStyle": "line", "lineWidth": 2, "fillOpacity": 10, "showPoints": "never", "spanNulls": False,
            "stacking": {"mode": "none", "group": "A"},
        }  # fmt: skip
    return {"align": "auto", "filterable": True} if panel.viz == "table" else {}


def _override(name: str, properties: Mapping[str, Any]) -> Json:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": key, "value": value} for key, value in properties.items()],
    }


def _thresholds(steps: Sequence[tuple[float | None, str]]) -> Json:
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}


def _datasource() -> Json:
    return {"type": PLUGIN, "uid": "${datasource}"}


def _sibling_link() -> Json:
    return {
        "title": "spendfuse", "type": "dashboards", "tags": ["spendfuse"], "asDropdown": True, "includeVars": True,
        "keepTime": True, "targetBlank": False, "icon": "external link", "tooltip": "", "url": "",
    }  # fmt: skip


def _built_in_annotation() -> Json:
    return {
        "builtIn": 1, "datasource": {"type": "grafana", "uid": "-- Grafana --"}, "enable": True, "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)", "name": "Annotations & Alerts", "type": "dashboard",
    }  # fmt: skip


def _annotation(annotation: Annotation) -> Json:
    target = {
        "editorType": "sql", "format": TABLE, "pluginVersion": PLUGIN_VERSION, "queryType": "table",
        "rawSql": annotation.sql, "refId": "Anno",
    }  # fmt: skip
    return {
        "datasource": _datasource(), "enable": True, "hide": False, "iconColor": annotation.color,
        "name": annotation.name, "target": target,
    }  # fmt: skip


def _datasource_variable() -> Json:
    return {
        "type": "datasource", "name": "datasource", "label": "ClickHouse", "query": PLUGIN, "current": {}, "hide": 0,
        "includeAll": False, "multi": False, "options": [], "refresh": 1, "regex": "", "skipUrlSync": False,
    }  # fmt: skip


def _variable(variable: Variable) -> Json:
    query = {
        "editorType": "sql", "format": TABLE, "pluginVersion": PLUGIN_VERSION, "queryType": "sql",
        "rawSql": variable.sql, "refId": "var",
    }  # fmt: skip
    chosen: Json = {key: [value] for key, value in ALL_VALUE.items()} if variable.several else {}
    return {
        "type": "query", "name": variable.name, "label": variable.label, "datasource": _datasource(), "query": query,
        "definition": variable.sql, "current": chosen, "hide": 0, "includeAll": variable.several,
        "multi": variable.several, "options": [], "refresh": 1, "regex": "", "skipUrlSync": False, "sort": 0,
    }  # fmt: skip
