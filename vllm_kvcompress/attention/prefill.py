# SPDX-License-Identifier: Apache-2.0
"""Attention of prefills through FlashAttention: exact over the step's own keys, tile by tile over the 2-bit history.

The history of earlier chunks is dequantised into a workspace of fixed size, whatever the context: gather a tile,
attend to it without a mask, merge by the log-sum-exps, next tile. Only the prompt's own chunk attends exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_kvcompress import compat

HISTORY_TOKENS = 1 << 14
"""History tokens dequantised at a time, all requests of a step together: 64 MiB with 8 KV heads of size 128."""


class FlashAttention(Protocol):
    """Variable-length attention that also tells its log-sum-exps; natural logarithm, [Hq, T] float32."""

    @property
    def name(self) -> str: ...

    def exact(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        scale: float,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Causal attention of each request's new tokens over themselves.

        Args:
            query: [T, Hq, D]; key, value: [T, H, D] of one dtype, last dimension contiguous.
            query_start_loc: [R + 1] int32.
            out: [T, Hq, D], written.

        Returns:
            LSE [Hq, T].
        """
        ...

    def history(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        query_start_loc: torch.Tensor,
        cu_history: torch.Tensor,
        max_query_len: int,
        max_history: int,
        scale: float,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of each request's new tokens over all its rows of a tile; requests without rows get zeros.

        Args:
            query: [T, Hq, D]; keys, values: [N, H, D] fp16; cu_history: [R + 1] int32 rows of each request.
            out: [T, Hq, D] fp16, written.

        Returns:
            LSE [Hq, T], infinite where there are no rows.
        """
        ...

    def merge(
        self, out: torch.Tensor, lse: torch.Tensor, tile_out: torch.Tensor, tile_lse: torch.Tensor
    ) -> torch.Tensor:
        """Merge a tile into `out` in place; returns the LSE of both."""
        ...


@dataclass(frozen=True)
class VllmFlashAttention:
    """vLLM's own build of FlashAttention, in the version it would use itself (3 on Hopper)."""

    version: int
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"FlashAttention {self.version}"

    def exact(self, query, key, value, query_start_loc, max_query_len, scale, out):
        _, lse = self.function(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=max_query_len,
            cu_seqlens_q=query_start_loc,
            max_seqlen_k=max_query_len,
            cu_seqlens_k=query_start_loc,
            softmax_scale=scale,
            causal=True,
            return_softmax_lse=True,
            out=out,
            fa_version=self.version,
        )
        return lse

    def history(self, query, keys, values, query_start_loc, cu_history, max_query_len, max_history, scale, out):
        _, lse = self.function(
            q=query,
            k=keys,
            v=values,
            max_seqlen_q=max_query_len,
            cu_seqlens_q=query_start_loc,
            max_seqlen_k=max_history,
            cu_seqlens_k=cu_history,
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
            out=out,
            fa_version=self.version,
        )
        return lse

    def merge(self, out, lse, tile_out, tile_lse):
        merged = torch.empty_like(lse)
        compat.merge_attention_states(out, out, lse, tile_out, tile_lse, merged)
        return merged


def find_flash_attention(head_dim: int, dtype: torch.dtype) -> VllmFlashAttention | str:
    """vLLM's FlashAttention for this head size and model dtype, or why it does not serve."""
    if dtype.itemsize != 2:
        return f"FlashAttention serves bfloat16 and float16, the model is {str(dtype).removeprefix('torch.')}"
    found = compat.flash_attention(head_dim)
    if isinstance(found, str):
        return f"no FlashAttention: {found}"
    function, version = found
    return VllmFlashAttention(version, function)
