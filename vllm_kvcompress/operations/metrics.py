# SPDX-License-Identifier: Apache-2.0
"""Our metrics on vLLM's /metrics: their names and meanings, and how they get there.

`observer` counts in the engine core; vLLM carries the numbers to an API server with its own, once a step, where they
are exported with vLLM's labels, `model_name` and `engine`. So several API servers and data parallelism are vLLM's
affair, and --disable-log-stats turns them off as it does vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_kvcompress import __version__, compat
from vllm_kvcompress.operations.facts import find_facts

PREFIX = "vllm:kvcompress_"


@dataclass(frozen=True)
class Metric:
    kind: Literal["gauge", "counter"]
    documentation: str


METRICS = {
    "compressed_bytes": Metric(
        "gauge", "Bytes of KV cache pages in use in each worker, those of kept episodes too, 16-bit windows not."
    ),
    "window_pages": Metric("gauge", "Pages of the 16-bit windows in use, a shared one once."),
    "kept_episodes": Metric("gauge", "Histories whose pages are kept, in the KV cache or in host memory."),
    "window_fallback_tokens": Metric(
        "counter",
        "Tokens in a request's 16-bit windows that are read from compressed pages, because the request took over "
        "pages (a prefix hit, an episode) and the windows' were not among them.",
    ),
    "evicted_tokens": Metric("counter", "Tokens evicted, per layer and KV head: the mean of the layers."),
    "episodes_built": Metric("counter", "Histories that were read and kept."),
    "episodes_reused": Metric("counter", "Requests that began with the pages of a kept history."),
    "episodes_restored": Metric("counter", "Those of them whose pages came back from host memory."),
    "episodes_spilled": Metric("counter", "Kept histories that gave way to host memory."),
    "episodes_lost": Metric("counter", "Kept histories that gave way for good: they are read again when asked about."),
}
"""Name after `PREFIX` -> what it is. Prometheus adds `_total` to the names of counters."""

_RATIO = "Bytes of a token in 16 bits over its bytes in the KV cache, 16-bit windows not included."
_INFO = (
    "Always 1. format: --kv-cache-dtype; kernels: what decodes (cuda, triton, torch, or vllm's own over 16-bit pages); "
    "bytes_per_token: in one layer and KV head; rotation: fingerprint of the rotation file."
)


class Metrics(KVConnectorPromMetrics):
    """vLLM makes one in every process that serves /metrics."""

    def __init__(
        self, vllm_config: Any, metric_types: dict, labelnames: list[str], labelvalues: dict[int, list]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, labelvalues)
        facts = find_facts(vllm_config)
        self._metrics = {name: self._make(name, metric.kind, metric.documentation) for name, metric in METRICS.items()}
        for gauge in self._make("compression_ratio", "gauge", _RATIO).values():
            gauge.set(facts.ratio)
        about = {
            "format": facts.cache_dtype,
            "kernels": facts.kernels,
            "bytes_per_token": str(facts.bytes_per_token),
            "rotation": facts.fingerprint,
            "version": __version__,
        }
        info = self._gauge("info", _INFO, [*labelnames, *about])
        for values in labelvalues.values():
            info.labels(*values, *about.values()).set(1)

    def _make(self, name: str, kind: Literal["gauge", "counter"], documentation: str) -> dict[int, Any]:
        """Engine -> its metric."""
        if kind == "gauge":
            made = self._gauge(name, documentation, self._labelnames)
        else:
            made = self._counter_cls(name=PREFIX + name, documentation=documentation, labelnames=self._labelnames)
        return create_metric_per_engine(made, self.per_engine_labelvalues)

    def _gauge(self, name: str, documentation: str, labelnames: list[str]) -> Any:
        gauge: Any = self._gauge_cls  # Prometheus's, or what stands for it
        # As vLLM's own: several API servers hear of an engine, each of some of its steps.
        return gauge(
            name=PREFIX + name, documentation=documentation, labelnames=labelnames, multiprocess_mode="mostrecent"
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """What `observer.Observer` sent: values of gauges, and by how much counters have grown."""
        for name, value in transfer_stats_data[compat.STATISTICS].items():
            metric = self._metrics[name][engine_idx]
            if METRICS[name].kind == "gauge":
                metric.set(value)
            else:
                metric.inc(value)
