# SPDX-License-Identifier: Apache-2.0
"""Reading history inside a kernel, from the bytes of pages and from 16-bit windows: what `attend` and `gather` share.

Ids of pages and blocks times their strides overflow 32 bits: offsets are int64.

A row's codes are read by position. The channels of a part are cut into chunks whose sizes are powers of two, for no
tensor has another, and those of a chunk into `positions` tensors of `columns` columns: channel positions * j + i of the
chunk is column j of the i-th. The codes of a column, one of each position, lie side by side: in a word. Kernels take
all this as tuples of constants (`row_parts`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import PAGE_TOKENS, PageLayout, RowLayout
from vllm_kvcompress.quantizers import lloyd_max

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# What the entries of `row_parts`' tuples mean: of a part,
BITS = tl.constexpr(0)
CODES = tl.constexpr(1)
CODE_BYTES = tl.constexpr(2)
HIGH_BITS = tl.constexpr(3)
SCALES = tl.constexpr(4)
UNIT = tl.constexpr(5)
BEND = tl.constexpr(6)
CHUNK_COUNT = tl.constexpr(7)
# and of its first chunk; others follow.
CHANNEL = tl.constexpr(8)
IN_PART = tl.constexpr(9)
CHANNELS = tl.constexpr(10)
POSITIONS = tl.constexpr(11)
COLUMNS = tl.constexpr(12)
CHUNK_ENTRIES = tl.constexpr(5)


def layer_distances(pages: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Bytes from the pages of the first layer to those of each, and what all are multiples of, 16 at most.

    Raises:
        ValueError: dtypes, shapes or strides differ.
    """
    first = pages[0]
    for one in pages:
        if (one.dtype, one.shape, one.stride()) != (first.dtype, first.shape, first.stride()):
            raise ValueError(f"pages {list(one.shape)} and {list(first.shape)} are not of layers of one kind")
    distances = [one.data_ptr() - first.data_ptr() for one in pages]
    return distances, math.gcd(16, *distances)


@triton.jit
def layer_pages(pages_ptr, offsets_ptr, layer, ALIGNED: tl.constexpr):
    """Pages of a layer that lie offsets[layer] bytes, a multiple of ALIGNED, from those of the first."""
    return pages_ptr + tl.multiple_of(tl.load(offsets_ptr + layer), ALIGNED)


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
def load_part(head_ptr, tokens, exists, PARTS: tl.constexpr, P: tl.constexpr):
    """The words of a part's codes: a tuple for each chunk of one [N, columns] uint16, or two if codes have 3 bits.

    Args:
        head_ptr: a head's share of a page, uint8. tokens: [N], of the page. exists: nothing is read unless true.
        PARTS, P: of `row_parts`, and which of them.
    """
    WIDTH: tl.constexpr = PARTS[P][BITS]
    LOW: tl.constexpr = 2 if WIDTH == 3 else WIDTH
    FIRST: tl.constexpr = PARTS[P][CODES]
    ROW: tl.constexpr = PARTS[P][CODE_BYTES]
    HIGH: tl.constexpr = PARTS[P][HIGH_BITS]
    rows = head_ptr + FIRST + tokens * ROW
    COUNT: tl.constexpr = PARTS[P][CHUNK_COUNT]
    found = ()
    for c in tl.static_range(COUNT):
        words = (_load_chunk(rows, exists, LOW, PARTS, P, c),)
        if WIDTH == 3:
            words += (_load_chunk(rows + HIGH, exists, 1, PARTS, P, c),)
        found += (words,)
    return found


@triton.jit
def _load_chunk(rows, exists, WIDTH: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    FIRST: tl.constexpr = PARTS[P][IN_PART + CHUNK_ENTRIES * C] * WIDTH // 8
    SIZE: tl.constexpr = PARTS[P][CHANNELS + CHUNK_ENTRIES * C]
    COUNT: tl.constexpr = PARTS[P][POSITIONS + CHUNK_ENTRIES * C]
    WIDE: tl.constexpr = PARTS[P][COLUMNS + CHUNK_ENTRIES * C]
    return load_words(rows + FIRST, exists, WIDTH, SIZE, COUNT, WIDE)


@triton.jit
def load_words(rows, exists, WIDTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """[N, WIDE] uint16 words of codes: that at position i in bits WIDTH * i and up, anything beyond the last.

    Args:
        rows: [N] pointers to SIZE codes of WIDTH bits, 1, 2 or 4, low bits first. COUNT: positions of a word.
    """
    WORD: tl.constexpr = WIDTH * COUNT
    columns = tl.arange(0, WIDE)
    mask = exists & (columns < SIZE // COUNT)[None, :]
    if WORD == 16:
        typed = rows.to(tl.pointer_type(tl.uint16), bitcast=True)
        words = tl.load(typed[:, None] + columns[None, :], mask=mask, other=0)
    elif WORD == 8:
        words = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0).to(tl.uint16)
    else:
        packed = tl.load(rows[:, None] + (columns * WORD // 8)[None, :], mask=mask, other=0)
        words = packed.to(tl.uint16) >> (columns * WORD % 8).to(tl.uint16)[None, :]
    return words


@triton.jit
def levels_at(words, POSITION: tl.constexpr, WIDTH: tl.constexpr, CURVE: tl.constexpr):
    """x * (1 + CURVE * x^2) as fp16, x = 2 * code - (2^WIDTH - 1), for the codes at a position in words.

    Or-ed into the fp16 of 1024, S bits up, a code adds itself times 2^S, and a multiply-add gives x exactly: two codes
    an instruction and no conversion from integers, which is slow. S is 1 or more, for else the multiply-add's constant,
    1024 and an odd number, would not be an fp16; the code ends below bit 10.

    Args:
        words: of `load_part`, one chunk's. WIDTH: 1 to 4 bits.
    """
    LOW: tl.constexpr = 2 if WIDTH == 3 else WIDTH
    BEGIN: tl.constexpr = LOW * POSITION
    S: tl.constexpr = 1 if BEGIN == 0 else (BEGIN - 7 if BEGIN + LOW > 10 else BEGIN)
    STEP: tl.constexpr = 2.0 ** (1 - S)
    MIDDLE: tl.constexpr = -(1024 * STEP + 2**WIDTH - 1)
    low = _shifted(words[0], S - BEGIN)
    if WIDTH == 3:
        x = _centred_three(low, _shifted(words[1], S + 2 - POSITION), 3 << S, 7 << S, STEP, MIDDLE)
    else:
        x = _centred(low, (2**WIDTH - 1) << S, STEP, MIDDLE)
    if CURVE != 0:
        x = _bent(x, CURVE)
    return x


@triton.jit
def _shifted(words, BY: tl.constexpr):
    """uint16 words shifted left, or right if BY is negative. Bits that come in from beyond the word are anything."""
    if BY == 0:
        return words
    elif _INTERPRETED:
        return words << BY if BY > 0 else words >> -BY
    # Two words at a time: one lets bits into the other.
    elif BY > 0:
        return tl.inline_asm_elementwise(f"shl.b32 $0, $1, {BY};", "=r,r", [words], tl.uint16, True, 2)
    else:
        return tl.inline_asm_elementwise(f"shr.b32 $0, $1, {-BY};", "=r,r", [words], tl.uint16, True, 2)


@triton.jit
def _centred(words, MASK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr):
    """(1024 + masked word) * STEP + MIDDLE as fp16. As `_centred_three` and `_bent`, two at a time: of the same in
    Triton's own operations compilers make single ones, or shuffle the pairs."""
    if _INTERPRETED:
        return ((words & MASK) | 0x6400).to(tl.float16, bitcast=True) * STEP + MIDDLE
    else:
        constants = (tl.full([1, 1], MASK, tl.uint16), _half(STEP), _half(MIDDLE))
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h;
            lop3.b32 h, $1, $2, 0x64006400, 0xEA;
            fma.rn.f16x2 $0, h, $3, $4;
            }""",
            "=r,r,r,r,r",
            [words, constants[0], constants[1], constants[2]],
            tl.float16,
            True,
            2,
        )


@triton.jit
def _centred_three(low, high, LOW_MASK: tl.constexpr, MASK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr):
    """`_centred` of words whose bits under LOW_MASK are those of `low` and the others those of `high`."""
    if _INTERPRETED:
        return _centred((low & LOW_MASK) | (high & (MASK - LOW_MASK)), MASK, STEP, MIDDLE)
    else:
        masks = (tl.full([1, 1], LOW_MASK, tl.uint16), tl.full([1, 1], MASK, tl.uint16))
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h;
            lop3.b32 h, $3, $1, $2, 0xCA;
            lop3.b32 h, h, $4, 0x64006400, 0xEA;
            fma.rn.f16x2 $0, h, $5, $6;
            }""",
            "=r,r,r,r,r,r,r",
            [low, high, masks[0], masks[1], _half(STEP), _half(MIDDLE)],
            tl.float16,
            True,
            2,
        )


@triton.jit
def _bent(x, CURVE: tl.constexpr):
    """x * (1 + CURVE * x^2), fp16."""
    if _INTERPRETED:
        # Exact in float32, then rounded once, as the fused multiply-add rounds.
        square = (x * x * _half(CURVE)).to(tl.float32)
        return (square * x.to(tl.float32) + x.to(tl.float32)).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 square;
            mul.rn.f16x2 square, $1, $1;
            mul.rn.f16x2 square, square, $2;
            fma.rn.f16x2 $0, square, $1, $1;
            }""",
            "=r,r,r",
            [x, _half(CURVE)],
            tl.float16,
            True,
            2,
        )


@triton.jit
def _half(VALUE: tl.constexpr):
    return tl.full([1, 1], VALUE, tl.float16)


@triton.jit
def interleave(tensors):
    """1, 2, 4 or 8 tensors [N, C] -> [N, count * C]: column count * j + i is column j of the i-th."""
    if len(tensors) == 8:
        even = interleave_four(tensors[0], tensors[2], tensors[4], tensors[6])
        return tl.interleave(even, interleave_four(tensors[1], tensors[3], tensors[5], tensors[7]))
    elif len(tensors) == 4:
        return interleave_four(tensors[0], tensors[1], tensors[2], tensors[3])
    elif len(tensors) == 2:
        return tl.interleave(tensors[0], tensors[1])
    else:
        return tensors[0]


@triton.jit
def load_halves(head_ptr, OFFSET: tl.constexpr, tokens, mask):
    """One fp16 of each token of a page, float32; 0 where masked, for what nobody wrote may be NaN."""
    halves_ptr = (head_ptr + OFFSET).to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(halves_ptr + tokens, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_part_scales(head_ptr, tokens, mask, AFFINE: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr):
    """(scale, middle) of tokens, float32, 0 where masked: their values are scale * `levels_at` + middle.

    The middle is zero unless AFFINE. A constant factor of the scale, UNIT, is the caller's to apply.
    """
    OFFSET: tl.constexpr = PARTS[P][SCALES]
    if AFFINE:
        scale, zero = load_scales(head_ptr, OFFSET, tokens, mask)
        return scale, zero + 1.5 * scale
    else:
        scale = load_halves(head_ptr, OFFSET, tokens, mask)
        return scale, tl.zeros_like(scale)


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
        "K_AFFINE": layout.keys.quantizer == "affine",
        "V_AFFINE": layout.values.quantizer == "affine",
        "K_PARTS": row_parts(layout.keys, 16),
        "V_PARTS": row_parts(layout.values, 32 if layout.head_dim == 256 else 16),
        "SIGNS": layout.keys.signs,
        "SIGN_NORMS": layout.keys.sign_norms,
        "K_MEAN": layout.k_mean,
    }


def row_parts(rows: RowLayout, columns: int) -> tuple[tuple[int | float, ...], ...]:
    """A row's layout as kernels take it: a flat tuple for each part, for Triton passes on no deeper nesting.

    BITS of a code; CODES: offset in a head's share of a page, in bytes; CODE_BYTES of a token; HIGH_BITS: offset in
    those of the third bits of 3-bit codes; SCALES: offset of the scales; UNIT and BEND: a value is scale * UNIT *
    x * (1 + BEND * x^2) for x = 2 * code - (2^bits - 1), and of affine codes more by zero + 1.5 * scale; CHUNK_COUNT.
    For each chunk: its first CHANNEL in the row; the same IN_PART; CHANNELS; POSITIONS x COLUMNS, as many or more.

    Args:
        columns: fewest of a chunk. 16 is the depth of a tensor core's product, but of values, where columns are its
            width, four warps that share it need 32.
    """
    parts = []
    for part in rows.parts:
        a, b = (1.0, 0.0) if rows.quantizer == "affine" else lloyd_max.cubic(part.channels, part.bits)
        chunks = _chunks(part.first_channel, part.channels, part.bits, columns)
        entries = [part.bits, part.codes, part.code_bytes, part.channels // 4, part.scales, a / 2, b / 4, len(chunks)]
        parts.append((*entries, *(entry for chunk in chunks for entry in chunk)))
    return tuple(parts)


def chunk_ranges(parts: tuple[tuple[int | float, ...], ...]) -> tuple[tuple[int | float, ...], ...]:
    """(first channel, channels, width) of every chunk of `row_parts`; the width is a power of two, padding included."""
    chunks = [part[i : i + 5] for part in parts for i in range(CHANNEL.value, len(part), CHUNK_ENTRIES.value)]
    return tuple((first, channels, positions * columns) for first, _, channels, positions, columns in chunks)


def narrowest(parts: tuple[tuple[int | float, ...], ...]) -> int:
    """The fewest columns of a chunk."""
    return min(part[i] for part in parts for i in range(COLUMNS.value, len(part), CHUNK_ENTRIES.value))


def _chunks(first: int, channels: int, bits: int, columns: int) -> list[tuple[int, int, int, int, int]]:
    """Chunks of a part, of `columns` columns or more.

    Words of whole bytes are read best, so a part that fills more than half of them is one chunk.
    """
    chunks, begin = [], 0
    while begin < channels:
        rest = channels - begin
        most = 8 if bits == 1 else 4
        if columns * most < 2 * rest <= 2 * columns * most:
            size, positions = rest, most
        else:
            size = min(rest, max(columns, 1 << rest.bit_length() - 1))
            positions = max(1, min(most, size // columns))
        wide = max(columns, triton.next_power_of_2(triton.cdiv(size, positions)))
        chunks.append((first + begin, begin, size, positions, wide))
        begin += size
    return chunks


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
