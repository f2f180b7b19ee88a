# SPDX-License-Identifier: Apache-2.0
"""Two partial attentions become one: over a step's own exact tokens, in the model's basis, and over the history, in
cache space, which is un-rotated on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvcompress.triton_kernels._common import cast, check_rotation


def merge_states(
    out: torch.Tensor,
    exact_out: torch.Tensor,
    exact_lse: torch.Tensor,
    history_out: torch.Tensor,
    history_lse: torch.Tensor,
    v_unrotation: torch.Tensor | None,
) -> None:
    """out = w * exact_out + (1 - w) * history_out @ v_unrotation[i // (Hq / H)], weighted by the sums of exponentials.

    A side whose LSE is infinite has seen nothing: its output is not read. Both so: zeros. Never waits for the device.

    Args:
        out: [T, Hq, D] float16, bfloat16 or float32, written; may be exact_out itself.
        exact_out: [T, Hq, D] of any of these dtypes, in the model's basis.
        exact_lse, history_lse: [Hq, T] float32, natural logarithms.
        history_out: [T, Hq, D] float16 in cache space. The last dimension of all three is contiguous.
        v_unrotation: [H, D, D] float16, contiguous: R_v^T. None: identity.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    tokens, query_heads, head_dim = out.shape
    heads = query_heads if v_unrotation is None else v_unrotation.shape[0]
    check_rotation(v_unrotation, heads, head_dim)
    states = (out, exact_out, history_out)
    if any(x.shape != out.shape or x.stride(2) != 1 for x in states) or query_heads % heads:
        raise ValueError(
            f"out, exact_out and history_out must be [T, n * {heads}, {head_dim}] with contiguous heads, got "
            f"{[list(x.shape) for x in states]} with strides {[x.stride() for x in states]}"
        )
    if history_out.dtype != torch.float16:
        raise ValueError(f"history_out must be float16, got {history_out.dtype}")
    for lse in (exact_lse, history_lse):
        if lse.shape != (query_heads, tokens) or lse.dtype != torch.float32:
            raise ValueError(f"LSEs must be float32 [{query_heads}, {tokens}], got {lse.dtype} {list(lse.shape)}")
    if tokens == 0:
        return
    block_d = triton.next_power_of_2(head_dim)
    # A block of the matrix has 32 KiB at most.
    block_c = min(block_d, 16384 // block_d)
    block_t = 64
    # Column blocks of a tile read the same rows of the history, so they are neighbours.
    _merge_kernel[(block_d // block_c, triton.cdiv(tokens, block_t), heads)](
        out,
        out.stride(0),
        out.stride(1),
        exact_out,
        exact_out.stride(0),
        exact_out.stride(1),
        exact_lse,
        exact_lse.stride(0),
        exact_lse.stride(1),
        history_out,
        history_out.stride(0),
        history_out.stride(1),
        history_lse,
        history_lse.stride(0),
        history_lse.stride(1),
        v_unrotation,
        tokens,
        GROUP=query_heads // heads,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_C=block_c,
        BLOCK_T=block_t,
        num_warps=4,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _merge_kernel(
    out_ptr,
    out_stride_token,
    out_stride_head,
    exact_ptr,
    exact_stride_token,
    exact_stride_head,
    exact_lse_ptr,
    exact_lse_stride_head,
    exact_lse_stride_token,
    history_ptr,
    history_stride_token,
    history_stride_head,
    history_lse_ptr,
    history_lse_stride_head,
    history_lse_stride_token,
    unrotation_ptr,
    num_tokens,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid: blocks of BLOCK_C columns x tiles of BLOCK_T tokens x KV heads, whose query heads share a matrix."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    kv_head = tl.program_id(2)
    token_mask = tokens < num_tokens
    column_mask = columns < D
    mask = token_mask[:, None] & column_mask[None, :]
    rows = tokens.to(tl.int64)
    inner = tl.arange(0, BLOCK_D)
    inner_mask = inner < D
    if unrotation_ptr is not None:
        matrix = unrotation_ptr + (kv_head * D + inner)[:, None] * D + columns[None, :]
        matrix = tl.load(matrix, mask=inner_mask[:, None] & column_mask[None, :], other=0.0)
    for i in tl.range(GROUP):
        head = kv_head * GROUP + i
        exact_rows = exact_ptr + rows * exact_stride_token + head * exact_stride_head
        exact = tl.load(exact_rows[:, None] + columns[None, :], mask=mask, other=0.0)
        history_rows = history_ptr + rows * history_stride_token + head * history_stride_head
        if unrotation_ptr is None:
            history = tl.load(history_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            x_mask = token_mask[:, None] & inner_mask[None, :]
            history = tl.dot(tl.load(history_rows[:, None] + inner[None, :], mask=x_mask, other=0.0), matrix)
        exact_lse = exact_lse_ptr + head * exact_lse_stride_head + rows * exact_lse_stride_token
        exact_lse = tl.load(exact_lse, mask=token_mask, other=0.0)
        history_lse = history_lse_ptr + head * history_lse_stride_head + rows * history_lse_stride_token
        history_lse = tl.load(history_lse, mask=token_mask, other=0.0)
        # FlashAttention calls an empty side -inf or +inf, by its version. A NaN stays one.
        no_exact = tl.abs(exact_lse) == float("inf")
        no_history = tl.abs(history_lse) == float("inf")
        history_weight = 1.0 / (1.0 + tl.exp2((exact_lse - history_lse) * 1.4426950408889634))
        history_weight = tl.where(no_history, 0.0, tl.where(no_exact, 1.0, history_weight))
        exact_weight = tl.where(no_exact, 0.0, 1.0 - history_weight)
        # What an empty side left in its output may be NaN.
        merged = tl.where((exact_weight != 0)[:, None], exact.to(tl.float32) * exact_weight[:, None], 0.0)
        merged += tl.where((history_weight != 0)[:, None], history * history_weight[:, None], 0.0)
        out_rows = out_ptr + rows * out_stride_token + head * out_stride_head
        tl.store(out_rows[:, None] + columns[None, :], cast(merged, out_ptr.dtype.element_ty), mask=mask)
