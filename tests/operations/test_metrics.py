# SPDX-License-Identifier: Apache-2.0
"""Names, labels and values as Prometheus reads them; how they get to a running server is in tests/e2e."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_kvcompress import compat, plugin
from vllm_kvcompress.operations import metrics
from vllm_kvcompress.operations.facts import Facts
from vllm_kvcompress.operations.metrics import METRICS, Metrics

FACTS = Facts("oscar-int2", 74, 512, Path("r.safetensors"), "ab" * 16, "cuda", "kernels=auto")


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def exported(registry, monkeypatch):
    """Of two engines, as data parallelism has them."""
    monkeypatch.setattr(metrics, "find_facts", lambda config: FACTS)
    kinds = {kind: functools.partial(kind, registry=registry) for kind in (Gauge, Counter, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    return Metrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})


def value(registry, name, engine):
    return registry.get_sample_value(name, {"model_name": "m", "engine": str(engine)})


def test_gauges_are_set_and_counters_grow_engine_by_engine(registry, exported):
    gauges = {name for name, metric in METRICS.items() if metric.kind == "gauge"}
    for round_number in (1, 2):
        for engine in (0, 1):
            exported.observe({compat.STATISTICS: dict.fromkeys(METRICS, 10 * engine + round_number)}, engine)
    for name in METRICS:
        if name in gauges:
            assert [value(registry, f"vllm:kvcompress_{name}", engine) for engine in (0, 1)] == [2, 12]
        else:
            assert [value(registry, f"vllm:kvcompress_{name}_total", engine) for engine in (0, 1)] == [3, 23]


def test_facts(registry, exported):
    labels = {
        "format": "oscar-int2",
        "kernels": "cuda",
        "bytes_per_token": "74",
        "rotation": "ab" * 16,
        "version": metrics.__version__,
    }
    for engine in (0, 1):
        assert value(registry, "vllm:kvcompress_compression_ratio", engine) == 512 / 74
        own = {"model_name": "m", "engine": str(engine)}
        assert registry.get_sample_value("vllm:kvcompress_info", {**own, **labels}) == 1


def test_other_engines_metrics_and_logs_are_vllms():
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm

    plugin.register()
    config = SimpleNamespace(
        kv_transfer_config=None, model_config=SimpleNamespace(), cache_config=SimpleNamespace(cache_dtype="auto")
    )
    assert KVConnectorProm(config, ["model_name", "engine"], {0: ["m", "0"]}).prom_metrics is None
    logged = KVConnectorLogging(None)
    logged.connector_cls = SimpleNamespace(build_kv_connector_stats=lambda data: data)
    logged.observe({compat.STATISTICS: {"window_pages": 1}})
    assert logged.transfer_stats_accumulator is None
    logged.observe({"bytes": 1})
    assert logged.transfer_stats_accumulator == {"bytes": 1}


def test_the_page_on_operations_lists_them(registry, exported):
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    text = prometheus_client.generate_latest(registry).decode()
    names = {line.split("{")[0] for line in text.splitlines() if line.startswith("vllm:") and "_created{" not in line}
    assert names == set(re.findall(r"vllm:kvcompress_\w+", page))
