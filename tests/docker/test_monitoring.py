# SPDX-License-Identifier: Apache-2.0
"""Grafana's dashboard asks for metrics that exist, in PromQL, from the data source that is provisioned."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml

from vllm_kvcompress.operations.metrics import METRICS, PREFIX

DOCKER = Path(__file__).resolve().parents[2] / "docker"
MONITORING = DOCKER / "monitoring"
(DASHBOARD,) = (json.loads(path.read_text()) for path in (MONITORING / "dashboards").glob("*.json"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
OURS = {PREFIX + name + "_total" * (metric.kind == "counter") for name, metric in METRICS.items()}
OURS |= {f"{PREFIX}info", f"{PREFIX}compression_ratio"}
"""As /metrics shows them."""


def vllm_names() -> set[str]:
    """The series that vLLM's Prometheus logger exports: its source tells names and kinds, whatever is switched on."""
    spec = importlib.util.find_spec("vllm.v1.metrics.loggers")
    suffixes = {"_gauge_cls": [""], "_counter_cls": ["_total"], "_histogram_cls": ["_bucket", "_sum", "_count"]}
    found = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in suffixes:
            for keyword in node.keywords:
                if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                    found |= {keyword.value.value.removesuffix("_total") + end for end in suffixes[node.func.attr]}
    return found


def used_names(text: str) -> set[str]:
    return set(re.findall(r"vllm:\w+", text))


def test_metrics_exist():
    theirs = vllm_names()
    assert {"vllm:num_requests_running", "vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_sum"} <= theirs
    used = used_names(" ".join(EXPRESSIONS))
    assert used - theirs == OURS
    for variable in DASHBOARD["templating"]["list"]:
        assert used_names(variable["query"]["query"]) <= theirs


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_parse(expression):
    promql_parser.parse(expression.replace("$__rate_interval", "1m"))


def test_parser_finds_faults():
    with pytest.raises(ValueError):
        promql_parser.parse("sum by (engine (vllm:num_requests_running)")


def test_panels_are_whole():
    """Distinct ids and places, on the provisioned data source, over the chosen model."""
    (source,) = yaml.safe_load((MONITORING / "provisioning" / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for y in range(place["y"], place["y"] + place["h"]):
            for x in range(place["x"], place["x"] + place["w"]):
                assert (x, y) not in cells, f"{panel['title']} lies over another panel"
                cells.add((x, y))
    for panel in PANELS:
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert all(
            target["expr"].count('{model_name=~"$model"}') == target["expr"].count("vllm:")
            for target in panel["targets"]
        )


def test_wiring():
    """Prometheus scrapes the server, Grafana asks Prometheus and reads the folder of dashboards that is mounted."""
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    (job,) = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}] and "server" in services
    (source,) = yaml.safe_load((MONITORING / "provisioning" / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    (provider,) = yaml.safe_load((MONITORING / "provisioning" / "dashboards" / "files.yaml").read_text())["providers"]
    assert f"./monitoring/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
