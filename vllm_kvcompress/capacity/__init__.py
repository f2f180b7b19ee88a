# SPDX-License-Identifier: Apache-2.0
"""How much fits: bytes per token, and what vLLM makes of the memory that is left for the KV cache."""
