"""Dashboards as code: the panels, the JSON Grafana loads, and the plugin's macros for whoever runs a panel's SQL."""

from spendfuse.grafana.dashboards import DASHBOARDS, dashboard, panels
from spendfuse.grafana.macros import ALL, MacroError, expand, interval_s
from spendfuse.grafana.spec import Annotation, Panel, Row, Variable

__all__ = [
    "ALL",
    "DASHBOARDS",
    "Annotation",
    "MacroError",
    "Panel",
    "Row",
    "Variable",
    "dashboard",
    "expand",
    "interval_s",
    "panels",
]
