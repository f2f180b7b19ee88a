# SPDX-License-Identifier: Apache-2.0
"""2-bit KV cache pages for vLLM: `vllm serve MODEL --kv-cache-dtype oscar-int2`."""

__version__ = "0.1.0"
