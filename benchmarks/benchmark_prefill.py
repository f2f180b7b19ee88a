# SPDX-License-Identifier: Apache-2.0
"""Prefill in chunks: a prompt over 2-bit history against FlashAttention 3 over a paged bf16 cache.

    python benchmarks/benchmark_prefill.py [--prompt 32768] [--chunk 8192] [--format oscar-int2] [--out DIR]

One prompt, one layer, 32 query and 8 KV heads of 128. Ours is what the engine runs for a layer, `GpuAttention.forward`:
rotate, quantise and store the chunk, attend to it exactly, gather the history tile by tile, attend, merge. The peer
reads a paged bf16 cache with the faster of pages of 16 and 128 tokens. "Attention" is ours less the store, measured
alone. "Layer" is a whole Llama-3.1-8B layer: the cache's write or our store, attention, and the matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import _common as common
import benchmark_store
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
    kept_blocks,
    number,
    random_pages,
    verdict,
)

SCALE = HEAD_DIM**-0.5
LEAST_SPEED = 0.95
TINY = (96, 48)
PAGE_TOKENS = 128
OURS, EXACT, STORE, WRITE, PRODUCTS = "ours", "FA3 bf16", "our store", "bf16 cache write", "matrix products"
WHOLE = "a chunk"


@dataclass(frozen=True)
class Chunk:
    history: int
    tokens: int

    @property
    def name(self) -> str:
        return f"chunk at {self.history}"

    @property
    def end(self) -> int:
        return self.history + self.tokens

    def lengths(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """query_start_loc [2], seq_lens [1], int32."""
        starts = torch.tensor([0, self.tokens], dtype=torch.int32, device=device)
        return starts, torch.tensor([self.end], dtype=torch.int32, device=device)


def inputs(chunk: Chunk, device: str) -> tuple[torch.Tensor, ...]:
    """query, key, value of the chunk in bf16, views of one tensor as a fused projection makes it; an output of NaN."""
    qkv = torch.randn(chunk.tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, device=device).bfloat16()
    query, key, value = qkv.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    return query, key, value, torch.full(query.shape, torch.nan, dtype=torch.bfloat16, device=device)


def prepare_ours(chunk: Chunk, prompt: int, page_format: str, device: str) -> Settings:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_kvcompress.attention.gpu import GpuAttention, Limits, layer_constants
    from vllm_kvcompress.attention.gpu_metadata import make_metadata
    from vllm_kvcompress.attention.prefill import find_flash_attention
    from vllm_kvcompress.attention.window_layer import WindowMetadata
    from vllm_kvcompress.formats import get_format

    flash = find_flash_attention(HEAD_DIM, torch.bfloat16)
    if isinstance(flash, str) and device != "cpu":
        raise RuntimeError(flash)
    columns, block_columns = -(-prompt // PAGE_TOKENS), -(-prompt // BLOCK_TOKENS)
    chosen = get_format(page_format)
    layout, pages = common.random_cache(1 + columns, page_format, device)
    table = random_pages(1 + columns, 1, columns, device)
    # Blocks that the engine holds: those this chunk reads, and of its own those that the next step will.
    kept = sorted({*kept_blocks(chunk.history), *kept_blocks(chunk.end)})
    window_cache = common.random_windows(1 + len(kept), layout, device)
    window_table = torch.zeros(1, block_columns, dtype=torch.int32, device=device)
    window_table[:, torch.tensor(kept, device=device)] = random_pages(1 + len(kept), 1, len(kept), device)
    positions = torch.arange(chunk.history, chunk.end, device=device)
    slots, window_slots = (
        found[0, positions // size].long() * size + positions % size
        for found, size in ((table, PAGE_TOKENS), (window_table, BLOCK_TOKENS))
    )
    starts, lengths = chunk.lengths(device)
    metadata = make_metadata(
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=lengths,
            num_reqs=1,
            num_actual_tokens=chunk.tokens,
            max_query_len=chunk.tokens,
            max_seq_len=chunk.end,
            block_table_tensor=table,
            slot_mapping=slots,
            seq_lens_cpu_upper_bound=lengths.cpu(),
        ),
        threshold=1,
        page_tokens=PAGE_TOKENS,
    )
    k_rotation, v_rotation = (common.random_orthogonal(NUM_KV_HEADS, HEAD_DIM, device).float() for _ in range(2))
    k_mean = torch.zeros(NUM_KV_HEADS, HEAD_DIM) if chosen.centring == "static" else None
    clips = chosen.clip_k, chosen.clip_v
    constants = layer_constants(torch.device(device), NUM_KV_HEADS, k_rotation, v_rotation, k_mean, *clips)
    attention = GpuAttention(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=SCALE,
        dtype=torch.bfloat16,
        window_dtype=torch.bfloat16,
        sink_tokens=SINKS,
        recent_tokens=RECENT,
        constants=constants,
        decode_kernel="triton",  # of decodes, which this step has none of
        flash=None if isinstance(flash, str) else flash,  # none in a dry run: Triton attends to the pages
        limits=Limits(max_tokens=chunk.tokens, max_requests=1, decode_query_len=1),
        device=torch.device(device),
    )
    windows = WindowMetadata(window_table, window_slots, BLOCK_TOKENS)
    query, key, value, out = inputs(chunk, device)

    def step() -> torch.Tensor:
        attention.forward(query, key, value, pages, layout, window_cache, metadata, windows, out)
        return out

    return {"": lambda: step}


def prepare_exact(chunk: Chunk, prompt: int, device: str) -> Settings:
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

    starts, lengths = chunk.lengths(device)
    query, _, _, out = inputs(chunk, device)
    tokens = (1 + -(-prompt // PAGE_TOKENS)) * PAGE_TOKENS
    pool = torch.randn(tokens, NUM_KV_HEADS, 2 * HEAD_DIM, device=device).bfloat16()

    def with_pages(page_tokens: int):
        k, v = pool.view(-1, page_tokens, NUM_KV_HEADS, 2 * HEAD_DIM).split(HEAD_DIM, dim=-1)
        table = random_pages(k.shape[0], 1, -(-chunk.end // page_tokens), device)
        # vLLM makes this once a step for all layers.
        metadata = get_scheduler_metadata(
            batch_size=1,
            max_seqlen_q=chunk.tokens,
            max_seqlen_k=chunk.end,
            num_heads_q=NUM_HEADS,
            num_heads_kv=NUM_KV_HEADS,
            headdim=HEAD_DIM,
            cache_seqlens=lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=page_tokens,
            causal=True,
        )

        def step() -> torch.Tensor:
            flash_attn_varlen_func(
                q=query,
                k=k,
                v=v,
                out=out,
                cu_seqlens_q=starts,
                max_seqlen_q=chunk.tokens,
                seqused_k=lengths,
                max_seqlen_k=chunk.end,
                softmax_scale=SCALE,
                causal=True,
                block_table=table,
                scheduler_metadata=metadata,
                fa_version=3,
            )
            return out

        return step

    return {f"pages of {size}": partial(with_pages, size) for size in (BLOCK_TOKENS, PAGE_TOKENS)}


# --- report -----------------------------------------------------------------------------------------------------------


def plus(*times: float | None) -> float | None:
    known = [us for us in times if us is not None]
    return sum(known) if len(known) == len(times) else None


@dataclass(frozen=True)
class Result:
    """Microseconds of some chunks; None where a part was not measured."""

    name: str
    exact: float | None
    attention: float | None
    exact_layer: float | None
    our_layer: float | None
    tokens: int

    @property
    def speed(self) -> float | None:
        """Tokens per second of a layer, ours by the peer's."""
        return None if self.our_layer is None or self.exact_layer is None else self.exact_layer / self.our_layer

    def row(self) -> list[str]:
        share = None if self.exact is None or not self.attention else self.exact / self.attention
        rates = [None if us is None else self.tokens / us * 1e6 for us in (self.exact_layer, self.our_layer)]
        return [
            self.name,
            number(self.exact),
            number(self.attention),
            number(share, 2, "x"),
            *(number(rate, 0) for rate in rates),
            number(self.speed, 3, "x"),
            verdict(self.speed, LEAST_SPEED),
        ]


HEADERS = ["", "FA3 us", "ours us", "attention", "FA3 layer tokens/s", "ours", "layer", f">= {LEAST_SPEED:g}"]


def result(bench: Bench, name: str, chunks: list[Chunk]) -> Result:
    store, write, products = (bench.us(peer, WHOLE) for peer in (STORE, WRITE, PRODUCTS))
    exact, ours = (plus(*(bench.us(peer, chunk.name) for chunk in chunks)) for peer in (EXACT, OURS))
    count = len(chunks)
    return Result(
        name,
        exact,
        None if ours is None or store is None else ours - count * store,
        plus(exact, *[write, products] * count),
        plus(ours, *[products] * count),
        sum(chunk.tokens for chunk in chunks),
    )


def draw(bench: Bench, chunks: list[Chunk], title: str, line: str, dry_run: bool):
    drawn, (ax,) = common.figure(title, line, dry_run)
    write = bench.us(WRITE, WHOLE)
    microseconds = {
        "ours: store and attention": [bench.us(OURS, chunk.name) for chunk in chunks],
        "FA3 bf16: cache write and attention": [plus(bench.us(EXACT, chunk.name), write) for chunk in chunks],
        "our store alone": [bench.us(STORE, WHOLE)] * len(chunks),
        "matrix products of the layer": [bench.us(PRODUCTS, WHOLE)] * len(chunks),
    }
    scaled = {name: [None if us is None else us / 1e3 for us in values] for name, values in microseconds.items()}
    common.bars(ax, [chunk.name for chunk in chunks], scaled, digits=2)
    ax.set_ylabel("milliseconds a chunk, one layer")
    return drawn


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a chunk; divides the prompt")
    parser.add_argument("--format", default="oscar-int2", help="page format")
    args = parser.parse_args()
    common.begin(args)
    if args.dry_run:
        args.prompt, args.chunk = TINY
    if args.prompt % args.chunk:
        parser.error(f"--chunk {args.chunk} does not divide --prompt {args.prompt}")
    found = common.environment(args.dry_run)
    line = common.environment_line(found)
    print(line, flush=True)
    device = "cpu" if args.dry_run else "cuda"
    chunks = [Chunk(first, args.chunk) for first in range(0, args.prompt, args.chunk)]
    bench = Bench(common.Timer(args.dry_run, args.seed))
    for chunk in chunks:
        bench.measure(EXACT, chunk.name, 0, partial(prepare_exact, chunk, args.prompt, device))
        bench.measure(OURS, chunk.name, 0, partial(prepare_ours, chunk, args.prompt, args.format, device))
    # These cost the same at any history.
    case = benchmark_store.Case(WHOLE, 1, args.chunk)
    bench.measure(STORE, WHOLE, 0, partial(benchmark_store.prepare_ours, case, args.format, device))
    bench.measure(WRITE, WHOLE, 0, partial(benchmark_store.prepare_plain, case, device))
    bench.measure(PRODUCTS, WHOLE, 0, partial(common.matrix_products, args.chunk, device))

    whole = result(bench, f"prompt of {args.prompt}", chunks)
    rows = [*(result(bench, chunk.name, [chunk]).row() for chunk in chunks), whole.row()]
    title = f"Prefill of {args.prompt} tokens in chunks of {args.chunk}, {args.format}"
    print(f"\n{title}\n\n{common.table(HEADERS, rows)}\n")
    fixed = ", ".join(f"{peer} {common.cell(bench.find(peer, WHOLE))}" for peer in (STORE, WRITE, PRODUCTS))
    print(f"Microseconds a chunk: {fixed}")
    print(common.footnotes(bench.rows))
    content = {"environment": found, "rows": common.as_dicts(bench.rows), "speed": whole.speed}
    common.write("benchmark_prefill", args, content, draw(bench, chunks, title, line, args.dry_run))


if __name__ == "__main__":
    main()
