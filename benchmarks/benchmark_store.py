# SPDX-License-Identifier: Apache-2.0
"""Storing a step's keys and values: our fused kernel against vLLM's bf16 cache write and against its own bytes.

    python benchmarks/benchmark_store.py [--format oscar-int2] [--out DIR]

The fused kernel centres, rotates, clips, quantises and packs into 2-bit pages and writes the 16-bit windows (first 64,
last 256 tokens). Peers: `reshape_and_cache_flash`, and the time in which a plain copy moves as many bytes. The share of
a prefill step: a Llama-3.1-8B layer's matrix products (bf16) and FlashAttention 3 over a first chunk, the shortest
attention a chunk of that size can have, so the largest share.
"""

from __future__ import annotations

from dataclasses import dataclass

import _common as common
import torch
from _common import (
    BLOCK_TOKENS,
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    RECENT,
    SINKS,
    Bench,
    Settings,
    number,
    random_pages,
    verdict,
)

CONTEXT = 8192
"""History of a decoding request; each begins its own number of tokens later, so that some begin a page."""
MOST_SHARE = 0.05
OURS, PLAIN, PRODUCTS, ATTENTION = "fused store", "reshape_and_cache_flash", "matrix products", "FA3 bf16"


@dataclass(frozen=True)
class Case:
    name: str
    requests: int
    new_tokens: int
    """of each request; more than one: a first chunk"""

    @property
    def tokens(self) -> int:
        return self.requests * self.new_tokens

    @property
    def is_prefill(self) -> bool:
        return self.new_tokens > 1


CASES = (Case("prefill 8192", 1, 8192), Case("decode 32", 32, 1), Case("decode 256", 256, 1))
TINY = (Case("prefill 200", 1, 200), Case("decode 3", 3, 1))


def kept(case: Case, position: int) -> bool:
    """Whether the engine keeps this token of a first chunk in 16 bits, or of a decode step: always."""
    return not case.is_prefill or position < SINKS or position >= case.new_tokens - RECENT


def keys_and_values(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H, D] each in bf16, views of one tensor as a fused projection makes it."""
    qkv = torch.randn(case.tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, device=device).bfloat16()
    _, key, value = qkv.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    return key, value


def prepare_ours(case: Case, page_format: str, device: str) -> Settings:
    from vllm_kvcompress.formats import get_format
    from vllm_kvcompress.formats.base import PAGE_TOKENS, page_fields
    from vllm_kvcompress.triton_kernels.store import store

    chosen = get_format(page_format)
    layout = chosen.layout(HEAD_DIM, PAGE_TOKENS)
    history = [0 if case.is_prefill else CONTEXT + index for index in range(case.requests)]
    columns = -(-(max(history) + case.new_tokens) // PAGE_TOKENS)
    num_pages = 1 + case.requests * columns
    pages = torch.zeros(num_pages, NUM_KV_HEADS, layout.head_bytes, dtype=torch.uint8, device=device)
    block_table = random_pages(num_pages, case.requests, columns, device)
    positions = torch.tensor([h + i for h in history for i in range(case.new_tokens)], device=device)
    request = torch.arange(case.requests, device=device).repeat_interleave(case.new_tokens)
    page = block_table[request, positions // PAGE_TOKENS].long()
    slots = page * PAGE_TOKENS + positions % PAGE_TOKENS
    in_window = torch.tensor([kept(case, i) for _ in history for i in range(case.new_tokens)], device=device)
    places = torch.cumsum(in_window, 0) - 1
    window_slots = torch.where(in_window, BLOCK_TOKENS + places, 0)
    blocks = 1 + -(-int(in_window.sum()) // BLOCK_TOKENS)
    window_cache = torch.zeros(blocks, NUM_KV_HEADS, BLOCK_TOKENS, 4 * HEAD_DIM, dtype=torch.uint8, device=device)
    key, value = keys_and_values(case, device)
    k_rotation, v_rotation = (common.random_orthogonal(NUM_KV_HEADS, HEAD_DIM, device) for _ in range(2))
    clips = [torch.full((NUM_KV_HEADS,), clip, device=device) for clip in (chosen.clip_k, chosen.clip_v)]
    k_mean = torch.randn(NUM_KV_HEADS, HEAD_DIM, device=device) if chosen.centring == "static" else None
    # Decode steps read their own tokens from here; a first chunk attends to the model's own keys and values.
    new_kv = None
    if not case.is_prefill:
        new_kv = torch.empty(case.tokens, NUM_KV_HEADS, 2 * HEAD_DIM, dtype=torch.bfloat16, device=device)
    starts = torch.arange(case.requests + 1, dtype=torch.int32, device=device) * case.new_tokens
    lengths = torch.tensor([h + case.new_tokens for h in history], dtype=torch.int32, device=device)
    last_page, last_offset = divmod(int(slots[-1]), PAGE_TOKENS)
    written = page_fields(pages, layout).v_scales[last_page, :, last_offset]
    written.fill_(torch.nan)

    def step() -> torch.Tensor:
        store(
            pages,
            layout,
            key,
            value,
            slots,
            starts,
            lengths,
            block_table,
            k_rotation=k_rotation,
            v_rotation=v_rotation,
            k_mean=k_mean,
            clip_k=clips[0],
            clip_v=clips[1],
            window_cache=window_cache,
            window_slots=window_slots,
            window_dtype=torch.bfloat16,
            new_kv=new_kv,
            max_query_len=case.new_tokens,
        )
        return written

    return {"": lambda: step}


def own_bytes(case: Case, page_format: str) -> int:
    """Keys and values read once, codes, scales, means, windows and `new_kv` written once."""
    from vllm_kvcompress.formats import get_format
    from vllm_kvcompress.formats.base import PAGE_TOKENS

    layout = get_format(page_format).layout(HEAD_DIM, PAGE_TOKENS)
    exact = 4 * HEAD_DIM  # bf16 K and V of a token and head
    in_windows = sum(kept(case, i) for i in range(case.new_tokens)) * case.requests
    written = case.tokens * layout.bytes_per_token + (in_windows + (0 if case.is_prefill else case.tokens)) * exact
    return NUM_KV_HEADS * (case.tokens * exact + written)


def prepare_plain(case: Case, device: str) -> Settings:
    from vllm import _custom_ops as ops

    key, value = keys_and_values(case, device)
    pages = 1 + case.requests * -(-case.new_tokens // BLOCK_TOKENS)
    cache = torch.full((pages, BLOCK_TOKENS, NUM_KV_HEADS, 2 * HEAD_DIM), torch.nan, device=device).bfloat16()
    k_cache, v_cache = cache.split(HEAD_DIM, dim=-1)
    table = random_pages(pages, case.requests, (pages - 1) // case.requests, device).long()
    offsets = torch.arange(case.new_tokens, device=device)
    slots = (table[:, offsets // BLOCK_TOKENS] * BLOCK_TOKENS + offsets % BLOCK_TOKENS).flatten()
    scale = torch.ones((), device=device)
    last_page, last_offset = divmod(int(slots[-1]), BLOCK_TOKENS)
    written = cache[last_page, last_offset]

    def step() -> torch.Tensor:
        ops.reshape_and_cache_flash(key, value, k_cache, v_cache, slots, "auto", scale, scale)
        return written

    return {"": lambda: step}


def prepare_attention(tokens: int, device: str) -> Settings:
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (torch.randn(tokens, count, HEAD_DIM, device=device).bfloat16() for count in heads)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)

    def step() -> torch.Tensor:
        return flash_attn_varlen_func(q, k, v, tokens, starts, tokens, cu_seqlens_k=starts, causal=True, fa_version=3)

    return {"": lambda: step}


def draw(bench: Bench, cases: tuple[Case, ...], copies: dict[str, float | None], line: str, dry_run: bool):
    drawn, (ax,) = common.figure("Storing keys and values of one layer (8 KV heads of 128)", line, dry_run)
    series = {name: [bench.us(name, case.name) for case in cases] for name in (OURS, PLAIN)}
    series["a copy of the fused store's bytes"] = [copies[case.name] for case in cases]
    common.bars(ax, [case.name for case in cases], series)
    ax.set_ylabel("microseconds")
    ax.set_yscale("log")
    return drawn


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--format", default="oscar-int2", help="page format")
    args = parser.parse_args()
    common.begin(args)
    found = common.environment(args.dry_run)
    line = common.environment_line(found)
    print(line, flush=True)
    device = "cpu" if args.dry_run else "cuda"
    cases = TINY if args.dry_run else CASES
    bench = Bench(common.Timer(args.dry_run, args.seed))
    for case in cases:
        bench.measure(
            OURS, case.name, own_bytes(case, args.format), lambda c=case: prepare_ours(c, args.format, device)
        )
        plain_bytes = 2 * NUM_KV_HEADS * case.tokens * 4 * HEAD_DIM
        bench.measure(PLAIN, case.name, plain_bytes, lambda c=case: prepare_plain(c, device))
    prefill = cases[0]
    bench.measure(PRODUCTS, prefill.name, 0, lambda: common.matrix_products(prefill.tokens, device))
    bench.measure(ATTENTION, prefill.name, 0, lambda: prepare_attention(prefill.tokens, device))

    copy = found.get("copy_gb_s")
    copies = {case.name: None if copy is None else own_bytes(case, args.format) / copy * 1e-3 for case in cases}
    rows = []
    for case in cases:
        ours, plain = bench.find(OURS, case.name), bench.find(PLAIN, case.name)
        rows.append(
            [
                case.name,
                common.cell(ours),
                common.cell(plain),
                number(bench.ratio(OURS, PLAIN, case.name), 2, "x"),
                number(copies[case.name]),
                number(ours.gb_s if ours else None, 0),
            ]
        )
    headers = ["step", f"{OURS} us", f"{PLAIN} us", "ours / bf16 write", "its bytes at copy speed, us", "GB/s"]
    print(f"\n{common.table(headers, rows)}")
    parts = [bench.us(name, prefill.name) for name in (OURS, PRODUCTS, ATTENTION)]
    share = None if None in parts else parts[0] / sum(parts)
    print(
        f"\nPrefill step of one Llama-3.1-8B layer, {prefill.tokens} tokens: matrix products {number(parts[1])} us, "
        f"attention {number(parts[2])} us, store {number(parts[0])} us = {'-' if share is None else f'{share:.1%}'} "
        f"of the step (target <= {MOST_SHARE:.0%}: {verdict(share, MOST_SHARE, at_least=False)})"
    )
    print(common.footnotes(bench.rows))
    content = {"environment": found, "rows": common.as_dicts(bench.rows), "copy_us": copies, "prefill_share": share}
    common.write("benchmark_store", args, content, draw(bench, cases, copies, line, args.dry_run))


if __name__ == "__main__":
    main()
