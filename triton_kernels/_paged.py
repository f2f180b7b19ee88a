# SPDX-License-Identifier: Apache-2.0
"""Reading history inside a kernel, from the bytes of 2-bit pages and from 16-bit windows: what `attend` and `gather`
share.

Ids of pages and blocks times their strides overflow 32 bits: offsets are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import PAGE_TOKENS, PageLayout

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def request_lengths(query_start_loc_ptr, seq_lens_ptr, request):
    """(first flat token, new tokens, history tokens) of a request; dummy runs may call a length 0 that is not."""
    first = tl.load(query_start_loc_ptr + request)
    new = tl.load(query_start_loc_ptr + request + 1) - first
    return first, new, tl.maximum(tl.load(seq_lens_ptr + request) - new, 0)


@triton.jit
def codes_at(packed, POSITION: tl.constexpr):
    """The code at `POSITION` of each byte, times 4^POSITION * 2^-24, as fp16.

    Masked where it lies, a code is a subnormal of fp16, which tensor cores multiply exactly: no shift, no conversion.
    The power is the caller's to undo.

    Args:
        packed: uint8; byte j holds channels 4j..4j+3, low bits first.
    """
    wide = packed.to(tl.uint16)
    if _INTERPRETED:
        masked = wide & (3 << (2 * POSITION))
    # The same for two bytes at a time. Compilers do not find it: they narrow the mask to a byte, then widen each.
    elif POSITION == 0:
        masked = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00030003;", "=r,r", [wide], tl.uint16, True, 2)
    elif POSITION == 1:
        masked = tl.inline_asm_elementwise("and.b32 $0, $1, 0x000c000c;", "=r,r", [wide], tl.uint16, True, 2)
    elif POSITION == 2:
        masked = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00300030;", "=r,r", [wide], tl.uint16, True, 2)
    else:
        masked = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00c000c0;", "=r,r", [wide], tl.uint16, True, 2)
    return masked.to(tl.float16, bitcast=True)


@triton.jit
def interleave_four(x0, x1, x2, x3):
    """Four [N, C] -> [N, 4 * C]: column 4j + p is column j of the p-th, the order of channels in bytes."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(x0.shape[0], 4 * x0.shape[1])


@triton.jit
def split_four(x):
    """[N, 4 * C] -> four [N, C]: column j of the p-th is column 4j + p."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 4, 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def load_scales(head_ptr, OFFSET: tl.constexpr, tokens, mask):
    """(scale, zero) of tokens of a page, float32; 0 where masked, for what nobody wrote may be NaN.

    Args:
        head_ptr: a head's share of a page, uint8. OFFSET: bytes to its interleaved fp16 pairs.
    """
    pairs_ptr = (head_ptr + OFFSET).to(tl.pointer_type(tl.uint32), bitcast=True)
    pairs = tl.load(pairs_ptr + tokens, mask=mask, other=0)
    scale = (pairs & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    zero = (pairs >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def is_windowed(positions, history, sink_tokens, recent_tokens):
    """Whether history tokens are read in 16 bits, if they have a companion block."""
    return (positions < history) & ((positions < sink_tokens) | (positions >= history - recent_tokens))


@triton.jit
def window_rows(
    window_ptr,
    window_stride,
    blocks,
    positions,
    kv_head,
    WINDOW_BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """Pointers to the 16-bit rows K | V of tokens in the given companion blocks."""
    row = kv_head * WINDOW_BLOCK + positions % WINDOW_BLOCK
    return window_ptr + blocks.to(tl.int64) * window_stride + row * (2 * D)


def page_constants(pages: torch.Tensor, layout: PageLayout) -> dict[str, int | None]:
    """Compile-time arguments of a kernel that reads pages [num_pages, H, head_bytes] uint8.

    Raises:
        ValueError: the layout or the strides of the pages are not what the kernels read.
    """
    heads, head_bytes = pages.shape[1:]
    if layout.page_tokens % PAGE_TOKENS:
        raise ValueError(
            f"the Triton kernels read pages of a multiple of {PAGE_TOKENS} tokens, not {layout.page_tokens}"
        )
    contiguous = pages.stride(2) == 1 and pages.stride(1) == head_bytes == layout.head_bytes
    if pages.dtype != torch.uint8 or not contiguous or pages.stride(0) % 4:
        raise ValueError(
            f"pages must be uint8 [num_pages, H, {layout.head_bytes}], each page contiguous and 4-byte aligned, got "
            f"{pages.dtype} {list(pages.shape)} with strides {pages.stride()}"
        )
    return {
        "NUM_KV_HEADS": heads,
        "D": layout.head_dim,
        "BLOCK_D": triton.next_power_of_2(layout.head_dim),
        "PAGE_TOKENS": layout.page_tokens,
        "HEAD_BYTES": head_bytes,
        "K_CODES": layout.k_codes,
        "V_CODES": layout.v_codes,
        "K_SCALES": layout.k_scales,
        "V_SCALES": layout.v_scales,
        "K_MEAN": layout.k_mean,
    }


def window_view(
    window_cache: torch.Tensor | None, window_table: torch.Tensor | None, window_dtype: torch.dtype, layout: PageLayout
) -> tuple[torch.Tensor | None, int, int, int]:
    """(typed cache, stride of its blocks in elements, stride of the table, tokens of a block), zeros without windows.

    Args:
        window_cache: [num_blocks, H, block, 4 * D] uint8; window_table: [R, max_blocks] int32.

    Raises:
        ValueError: only one of the two, or a cache whose blocks are not contiguous.
    """
    if window_cache is None and window_table is None:
        return None, 0, 0, 0
    if window_cache is None or window_table is None:
        raise ValueError("windows need both window_cache and window_table")
    _, _, block, row_bytes = window_cache.shape
    inner = (block * row_bytes, row_bytes, 1)
    if window_cache.dtype != torch.uint8 or row_bytes != 4 * layout.head_dim or window_cache.stride()[1:] != inner:
        raise ValueError(
            f"window_cache must be uint8 [num_blocks, H, block, {4 * layout.head_dim}], each block contiguous, got "
            f"{window_cache.dtype} {list(window_cache.shape)} with strides {window_cache.stride()}"
        )
    typed = window_cache.view(window_dtype)
    return typed, typed.stride(0), window_table.stride(0), block
