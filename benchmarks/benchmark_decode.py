# SPDX-License-Identifier: Apache-2.0
"""Decode attention: ours against FlashAttention 3 (bf16, fp8) and vLLM's TurboQuant and 4-bit caches.

    python benchmarks/benchmark_decode.py [--rotations] [--quick] [--triton] [--peers NAME,...] [--out DIR]

One query token per request, 32 query and 8 KV heads of 128, pages in random order, every peer as vLLM calls it in a
full decode graph. FlashAttention 3 gets four settings (pages of 16 and 128 tokens; the 32 splits that vLLM asks for in
CUDA graphs, and the kernel's own choice) and counts with its fastest. Rows of ours read the step's own token from 16
bits, the other peers from their cache. Neither quantising the query (fp8) nor rotating it (ours) is in a peer's time;
vLLM's TurboQuant and 4-bit kernels rotate inside the call. --rotations measures what ours costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

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
    kept_blocks,
    number,
    random_pages,
    verdict,
)

Step = Callable[[], torch.Tensor]

GROUP = NUM_HEADS // NUM_KV_HEADS
SCALE = HEAD_DIM**-0.5
TARGETS = {(1, 32768): 3.2, (1, 131072): 4.2, (8, 32768): 4.8, (32, 8192): 4.8, (32, 32768): 6.0, (8, 131072): 6.0}
"""Least speedup over FA3 bf16 without windows, by (batch, context)."""
QUICK = ((1, 32768), (32, 8192))
TINY = ((1, 300), (2, 600))
ROTATION_SHAPE = (32, 8192)
MOST_WINDOW_LOSS, MOST_ROTATION_SHARE = 0.08, 0.05
DECODE_SPLITS = 32
"""vLLM 0.33's flash_attn_max_num_splits_for_cuda_graph and tq_max_kv_splits_for_cuda_graph."""
PAGE_TOKENS = 128
"""Of ours."""

BASELINE = "FA3 bf16"


@dataclass(frozen=True)
class Shape:
    batch: int
    context: int

    @property
    def name(self) -> str:
        thousands = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        return f"{self.batch}, {thousands}"

    def pages(self, page_tokens: int) -> int:
        return -(-self.context // page_tokens)


class Peer:
    """One kernel with its cache. The pool is made once, large enough for every shape."""

    def __init__(self, shapes: list[Shape], device: str) -> None:
        self.device = device
        self.shapes = shapes

    def pool_pages(self, page_tokens: int) -> int:
        return 1 + max(shape.batch * shape.pages(page_tokens) for shape in self.shapes)

    def own_bytes(self, shape: Shape) -> int:
        raise NotImplementedError

    def prepare(self, shape: Shape) -> Settings:
        """{settings: maker of a step}; a step returns its output, NaN before the first call."""
        raise NotImplementedError

    def lengths(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """query_start_loc [B + 1], seq_lens [B], both int32."""
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=self.device)
        return starts, torch.full((shape.batch,), shape.context, dtype=torch.int32, device=self.device)

    def query(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape.batch, NUM_HEADS, HEAD_DIM, device=self.device).to(dtype)

    def output(self, shape: Shape) -> torch.Tensor:
        nan = float("nan")
        return torch.full((shape.batch, NUM_HEADS, HEAD_DIM), nan, dtype=torch.bfloat16, device=self.device)


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours(Peer):
    def __init__(
        self,
        shapes: list[Shape],
        device: str,
        page_format: str,
        windows: bool = False,
        rotations: bool = False,
        kernel: Literal["cuda", "triton"] | None = None,
    ) -> None:
        """kernel: None: the CUDA op where it reads the pages, else Triton."""
        super().__init__(shapes, device)
        from vllm_kvcompress.kernels.cuda_ops import code_arguments

        self.windows, self.rotations = windows, rotations
        self.layout, self.pages = common.random_cache(self.pool_pages(PAGE_TOKENS), page_format, device)
        self.kernel = kernel or ("triton" if code_arguments(self.layout) is None else "cuda")
        self.window_cache = None
        if windows:
            blocks = max(shape.batch * len(kept_blocks(shape.context - 1)) for shape in shapes)
            self.window_cache = common.random_windows(1 + blocks, self.layout, device)

    def _window_table(self, shape: Shape) -> torch.Tensor | None:
        if self.window_cache is None:
            return None
        kept = kept_blocks(shape.context - 1)
        table = torch.zeros(shape.batch, shape.pages(BLOCK_TOKENS), dtype=torch.int32, device=self.device)
        found = random_pages(self.window_cache.shape[0], shape.batch, len(kept), self.device)
        table[:, torch.tensor(kept, device=self.device)] = found
        return table

    def own_bytes(self, shape: Shape) -> int:
        history = shape.context - 1
        in_windows = min(history, SINKS + RECENT) if self.windows else 0
        per_token = (self.layout.k_mean or self.layout.head_bytes) // PAGE_TOKENS
        means = 0 if self.layout.k_mean is None else shape.pages(PAGE_TOKENS) * 2 * HEAD_DIM
        per_head = (history - in_windows) * per_token + means + (in_windows + 1) * 4 * HEAD_DIM
        return shape.batch * NUM_KV_HEADS * per_head

    def prepare(self, shape: Shape) -> Settings:
        from vllm_kvcompress.formats.base import sketch_matrix
        from vllm_kvcompress.kernels import cuda_ops
        from vllm_kvcompress.kernels.decode import Cache, Rows, decode, decode_workspace_elements
        from vllm_kvcompress.triton_kernels.rotate import rotate

        device = torch.device(self.device)
        if self.kernel == "cuda":
            available, reason = cuda_ops.is_available(device)
            if not available:
                raise RuntimeError(f"no CUDA operator: {reason}")
        q, out = self.query(shape, torch.float16), self.output(shape)
        new_kv = torch.randn(shape.batch, NUM_KV_HEADS, 2 * HEAD_DIM, device=device).bfloat16()
        starts, lengths = self.lengths(shape)
        sinks, recent = (SINKS, RECENT) if self.windows else (0, 0)
        cache = Cache(self.pages, self.layout, self.window_cache, torch.bfloat16, sinks, recent)
        block_table = random_pages(self.pages.shape[0], shape.batch, shape.pages(PAGE_TOKENS), self.device)
        rows = Rows(starts, lengths, block_table, self._window_table(shape), 1, shape.context)
        elements = decode_workspace_elements(self.kernel, device, NUM_KV_HEADS, GROUP, HEAD_DIM, shape.batch, 1)
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
        unrotated = self.query(shape, torch.bfloat16)
        sketch = sketch_matrix(HEAD_DIM).half().to(device) if self.layout.keys.signs is not None else None
        q_signs = q if sketch is not None and self.kernel == "cuda" else None  # S q; any numbers take as long
        rotation, unrotation = (common.random_orthogonal(NUM_KV_HEADS, HEAD_DIM, self.device) for _ in range(2))

        def attend() -> torch.Tensor:
            if self.rotations:
                rotate(unrotated, rotation, q)
            decode(
                self.kernel,
                q,
                new_kv,
                cache,
                rows,
                unrotation if self.rotations else None,
                SCALE,
                out,
                sketch=sketch,
                q_signs=q_signs,
                cache_out=None,
                workspace=workspace,
            )
            return out

        return {"": lambda: attend}


# --- FlashAttention 3 -------------------------------------------------------------------------------------------------


class FlashAttention3(Peer):
    def __init__(self, shapes: list[Shape], device: str, dtype: torch.dtype) -> None:
        super().__init__(shapes, device)
        self.dtype = dtype
        # [tokens, H, K | V], vLLM's default layout; pages of any size are views of it.
        tokens = (self.pool_pages(128)) * 128
        self.pool = torch.empty(tokens, NUM_KV_HEADS, 2 * HEAD_DIM, dtype=dtype, device=device)
        for part in self.pool.split(1 << 16):
            part.copy_(torch.randn(part.shape, device=device))

    def own_bytes(self, shape: Shape) -> int:
        return shape.batch * shape.context * NUM_KV_HEADS * 2 * HEAD_DIM * self.dtype.itemsize

    def prepare(self, shape: Shape) -> Settings:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

        q, out = self.query(shape, self.dtype), self.output(shape)
        starts, lengths = self.lengths(shape)
        is_fp8 = self.dtype != torch.bfloat16
        descale = torch.ones(1, device=self.device).expand(shape.batch, NUM_KV_HEADS) if is_fp8 else None

        def with_settings(page_tokens: int, splits: int) -> Step:
            k, v = self.pool.view(-1, page_tokens, NUM_KV_HEADS, 2 * HEAD_DIM).split(HEAD_DIM, dim=-1)
            block_table = random_pages(k.shape[0], shape.batch, shape.pages(page_tokens), self.device)
            # vLLM makes this once a step for all layers, outside the graph.
            metadata = get_scheduler_metadata(
                batch_size=shape.batch,
                max_seqlen_q=1,
                max_seqlen_k=shape.context,
                num_heads_q=NUM_HEADS,
                num_heads_kv=NUM_KV_HEADS,
                headdim=HEAD_DIM,
                cache_seqlens=lengths,
                qkv_dtype=self.dtype,
                cu_seqlens_q=starts,
                page_size=page_tokens,
                causal=True,
                num_splits=splits,
            )

            def attend() -> torch.Tensor:
                flash_attn_varlen_func(
                    q=q,
                    k=k,
                    v=v,
                    out=out,
                    cu_seqlens_q=starts,
                    max_seqlen_q=1,
                    seqused_k=lengths,
                    max_seqlen_k=shape.context,
                    softmax_scale=SCALE,
                    causal=True,
                    block_table=block_table,
                    scheduler_metadata=metadata,
                    q_descale=descale,
                    k_descale=descale,
                    v_descale=descale,
                    num_splits=splits,
                    fa_version=3,
                )
                return out

            return attend

        return {
            f"pages of {page_tokens}, {splits or 'own'} splits": partial(with_settings, page_tokens, splits)
            for page_tokens in (BLOCK_TOKENS, 128)
            for splits in (DECODE_SPLITS, 0)
        }


# --- vLLM's other low-bit caches --------------------------------------------------------------------------------------


class TurboQuant(Peer):
    """vLLM's TurboQuant decode as TurboQuantAttentionImpl calls it: the query's rotation is part of the call."""

    def __init__(self, shapes: list[Shape], device: str, cache_dtype: str) -> None:
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        super().__init__(shapes, device)
        self.config = config = TurboQuantConfig.from_cache_dtype(cache_dtype, HEAD_DIM)
        size = (self.pool_pages(BLOCK_TOKENS), BLOCK_TOKENS, NUM_KV_HEADS, config.slot_size_aligned)
        self.cache = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        # A slot: key codes, key norm | value codes, value scale, value zero; the three in fp16.
        halves = self.cache.view(torch.float16)
        scale = config.key_packed_size + config.value_packed_size - 4
        halves[..., config.key_packed_size // 2 - 1] = HEAD_DIM**0.5
        halves[..., scale // 2] = 2**-config.value_quant_bits
        halves[..., scale // 2 + 1] = -0.5

    def own_bytes(self, shape: Shape) -> int:
        return shape.batch * shape.context * NUM_KV_HEADS * self.config.slot_size_aligned

    def prepare(self, shape: Shape) -> Settings:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

        from vllm_kvcompress.quantizers.hadamard import hadamard

        config = self.config
        q, out = self.query(shape, torch.bfloat16), self.output(shape)
        _, lengths = self.lengths(shape)
        block_table = random_pages(self.cache.shape[0], shape.batch, shape.pages(BLOCK_TOKENS), self.device)
        rotation = hadamard(HEAD_DIM).to(self.device)
        centroids = get_centroids(HEAD_DIM, config.centroid_bits).to(self.device, torch.float32)
        partial = torch.empty(shape.batch, NUM_HEADS, DECODE_SPLITS, HEAD_DIM + 1, device=self.device)
        lse = torch.empty(shape.batch, NUM_HEADS, device=self.device)

        def attend() -> torch.Tensor:
            return triton_turboquant_decode_attention(
                query=q,
                kv_cache=self.cache,
                block_table=block_table,
                seq_lens=lengths,
                Pi=rotation,
                centroids=centroids,
                scale=SCALE,
                mse_bits=config.key_mse_bits,
                key_packed_size=config.key_packed_size,
                value_quant_bits=config.effective_value_quant_bits,
                key_fp8=config.key_fp8,
                norm_correction=config.norm_correction,
                PiT=rotation,
                mid_o_buf=partial,
                output_buf=out,
                lse_buf=lse,
                max_num_kv_splits=DECODE_SPLITS,
            )

        return {"": lambda: attend}


class Int4PerTokenHead(Peer):
    """vLLM's int4_per_token_head as TritonAttentionImpl calls it: Hadamard of query and output are part of the call."""

    _HALF = HEAD_DIM // 2 + 4  # a tensor's nibbles and its float32 scale, whose low bits hold the zero-point
    _SEGMENTS = 16  # NUM_PAR_SOFTMAX_SEGMENTS
    _MOST_REQUESTS_SEGMENTED = 16  # MIN_LAUNCH_GRID_SIZE_2D // 8 KV heads, a captured batch size

    def __init__(self, shapes: list[Shape], device: str) -> None:
        super().__init__(shapes, device)
        size = (self.pool_pages(BLOCK_TOKENS), BLOCK_TOKENS, NUM_KV_HEADS, 2 * self._HALF)
        self.cache = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        words = self.cache.view(torch.float32)
        self.k_scale, self.v_scale = words[..., HEAD_DIM // 8], words[..., (self._HALF + HEAD_DIM // 2) // 4]
        for scale in (self.k_scale, self.v_scale):
            scale.copy_(0.05 + 0.05 * torch.rand(scale.shape, device=device))

    def own_bytes(self, shape: Shape) -> int:
        return shape.batch * shape.context * NUM_KV_HEADS * 2 * self._HALF

    def prepare(self, shape: Shape) -> Settings:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        q, out = self.query(shape, torch.bfloat16), self.output(shape)
        starts, lengths = self.lengths(shape)
        block_table = random_pages(self.cache.shape[0], shape.batch, shape.pages(BLOCK_TOKENS), self.device)
        k, v = self.cache.split(self._HALF, dim=-1)
        rows = (self._MOST_REQUESTS_SEGMENTED, NUM_HEADS, self._SEGMENTS)
        partial = torch.empty(*rows, HEAD_DIM, device=self.device)
        most, total = (torch.empty(rows, device=self.device) for _ in range(2))

        def attend() -> torch.Tensor:
            unified_attention(
                q=q,
                k=k,
                v=v,
                out=out,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=lengths,
                max_seqlen_k=shape.context,
                softmax_scale=SCALE,
                causal=True,
                window_size=(-1, -1),
                block_table=block_table,
                softcap=0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
                seq_threshold_3D=self._MOST_REQUESTS_SEGMENTED,
                num_par_softmax_segments=self._SEGMENTS,
                softmax_segm_output=partial,
                softmax_segm_max=most,
                softmax_segm_expsum=total,
                kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD,
                k_scale_cache=self.k_scale,
                v_scale_cache=self.v_scale,
            )
            return out

        return {"": lambda: attend}


# --- report -----------------------------------------------------------------------------------------------------------

OTHER_TARGETS = {"turboquant-4": 2.5, "turboquant-3.5": 2.5}
"""Least speedup over FA3 bf16 at OTHER_SHAPE; 1 for the others of OTHERS."""
OTHER_SHAPE = "32, 32K"
OTHERS = (
    "turboquant-4",
    "turboquant-3.5",
    "turboquant-2.5",
    "turboquant-3.5-qjl",
    "turboquant-2.5-qjl",
    "oscar-int2-qjl",
)
"""Formats with other quantisers; without windows."""


OURS, WINDOWED, STATIC = "oscar-int2", "oscar-int2 + windows", "oscar-int2-static"
ROTATED, TRITON = "oscar-int2 + rotations", "oscar-int2 + windows + Triton"
PEERS: dict[str, Callable[[list[Shape], str], Peer]] = {
    BASELINE: lambda shapes, device: FlashAttention3(shapes, device, torch.bfloat16),
    "FA3 fp8": lambda shapes, device: FlashAttention3(shapes, device, torch.float8_e4m3fn),
    OURS: lambda shapes, device: Ours(shapes, device, OURS),
    WINDOWED: lambda shapes, device: Ours(shapes, device, OURS, windows=True),
    STATIC: lambda shapes, device: Ours(shapes, device, STATIC),
    ROTATED: lambda shapes, device: Ours(shapes, device, OURS, rotations=True),
    TRITON: lambda shapes, device: Ours(shapes, device, OURS, windows=True, kernel="triton"),
    **{name: partial(Ours, page_format=name) for name in OTHERS},
    # The likeliest to take the device down with them come last.
    "int4_per_token_head": Int4PerTokenHead,
    "turboquant_4bit_nc": lambda shapes, device: TurboQuant(shapes, device, "turboquant_4bit_nc"),
    "turboquant_3bit_nc": lambda shapes, device: TurboQuant(shapes, device, "turboquant_3bit_nc"),
}


def run(bench: Bench, name: str, shapes: list[Shape], device: str) -> None:
    """Time one peer at every shape. Where even its cache cannot be made, each shape's row says so."""
    made: list[Peer] = []

    def prepare(shape: Shape) -> Settings:
        if not made:
            made.append(PEERS[name](shapes, device))
        return made[0].prepare(shape)

    for shape in shapes:
        row = bench.measure(name, shape.name, 0, lambda shape=shape: prepare(shape))
        row.own_bytes = made[0].own_bytes(shape) if made else 0


def summary(bench: Bench, shapes: list[Shape]) -> str:
    shown = [name for name in PEERS if any(row.peer == name for row in bench.rows) and name != ROTATED]
    times = [[shape.name, *(common.cell(bench.find(name, shape.name)) for name in shown)] for shape in shapes]
    speeds = []
    for shape in shapes:
        found = [bench.find(name, shape.name) for name in shown]
        speeds.append([shape.name, *("-" if row is None else number(row.gb_s, 0) for row in found)])
    read = []
    for shape in shapes:
        found = [bench.find(name, shape.name) for name in shown]
        read.append([shape.name, *("-" if row is None else number(row.read_flush_us) for row in found)])
    goals = []
    for shape in shapes:
        plain, windowed = (bench.ratio(BASELINE, name, shape.name) for name in (OURS, WINDOWED))
        target = TARGETS.get((shape.batch, shape.context))
        loss = None if plain is None or windowed is None else 1 - windowed / plain
        goals.append(
            [
                shape.name,
                number(plain, 2, "x"),
                number(target, 1, "x"),
                "-" if target is None else verdict(plain, target),
                number(windowed, 2, "x"),
                "-" if loss is None else f"{loss:+.1%}",
                verdict(loss, MOST_WINDOW_LOSS, at_least=False) if shape.batch >= 8 else "no target",
                number(bench.ratio(BASELINE, STATIC, shape.name), 2, "x"),
            ]
        )
    parts = [
        "Microseconds",
        common.table(["batch, context", *shown], times),
        "Microseconds, L2 cleared by reading",
        common.table(["batch, context", *shown], read),
        "GB/s of a peer's own bytes",
        common.table(["batch, context", *shown], speeds),
        "Against FA3 bf16",
        common.table(
            ["batch, context", OURS, "target", "", WINDOWED, "loss", f"<= {MOST_WINDOW_LOSS:.0%}", STATIC], goals
        ),
    ]
    others = [
        [name, common.cell(row), number(ratio, 2, "x"), verdict(ratio, OTHER_TARGETS.get(name, 1.0))]
        for name in OTHERS
        if (row := bench.find(name, OTHER_SHAPE)) is not None
        and (ratio := bench.ratio(BASELINE, name, OTHER_SHAPE)) is not None
    ]
    if others:
        parts += [f"Other formats at {OTHER_SHAPE}", common.table(["format", "us", "FA3 bf16", "target"], others)]
    if rotated := next((row for row in bench.rows if row.peer == ROTATED), None):
        plain = bench.us(OURS, rotated.shape)
        share = None if plain is None or rotated.us is None else 1 - plain / rotated.us
        shown_share = "-" if share is None else f"{share:.1%}"
        parts.append(
            f"Rotating the query and un-rotating the output at {rotated.shape}: {common.cell(rotated)} us instead of "
            f"{number(plain)} us, {shown_share} of the step "
            f"(target <= {MOST_ROTATION_SHARE:.0%}: {verdict(share, MOST_ROTATION_SHARE, at_least=False)})"
        )
    if notes := common.footnotes(bench.rows):
        parts.append(notes)
    return "\n\n".join(parts)


def draw(bench: Bench, shapes: list[Shape], title_line: str, dry_run: bool):
    shown = [name for name in PEERS if any(row.peer == name for row in bench.rows) and name not in (BASELINE, ROTATED)]
    title = "Decode attention: speedup over FlashAttention 3 bf16 (32/8 heads of 128, CUDA-graph replay, medians)"
    drawn, (ax,) = common.figure(title, title_line, dry_run)
    series = {name: [bench.ratio(BASELINE, name, shape.name) for shape in shapes] for name in shown}
    common.bars(ax, [f"batch {shape.name}" for shape in shapes], series)
    for index, shape in enumerate(shapes):
        if target := TARGETS.get((shape.batch, shape.context)):
            ax.plot([index - 0.45, index + 0.45], [target, target], "k--", linewidth=0.8)
    ax.axhline(1, color="gray", linewidth=0.8)
    ax.set_ylabel("times as fast (dashes: target without windows)")
    return drawn


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rotations", action="store_true", help="also measure what rotating and un-rotating costs")
    parser.add_argument("--triton", action="store_true", help="also measure the Triton kernel that other GPUs get")
    parser.add_argument("--quick", action="store_true", help="two shapes instead of six")
    parser.add_argument("--peers", help=f"only these, comma-separated: {', '.join(PEERS)}")
    args = parser.parse_args()
    common.begin(args)
    if unknown := set(args.peers.split(",") if args.peers else ()) - PEERS.keys():
        parser.error(f"unknown peers {sorted(unknown)}; known: {', '.join(PEERS)}")
    wanted = set(args.peers.split(",")) if args.peers else set(PEERS)
    if not args.rotations:
        wanted.discard(ROTATED)
    if not args.triton:
        wanted.discard(TRITON)
    found = common.environment(args.dry_run)
    print(common.environment_line(found), flush=True)
    shapes = [Shape(*shape) for shape in (TINY if args.dry_run else QUICK if args.quick else tuple(TARGETS))]
    device = "cpu" if args.dry_run else "cuda"
    bench = Bench(common.Timer(args.dry_run, args.seed))
    for name in PEERS:
        if name in wanted:
            rotated = [Shape(*ROTATION_SHAPE)] if not args.dry_run else shapes[-1:]
            run(bench, name, rotated if name == ROTATED else shapes, device)
            bench.release()
    print(f"\n{summary(bench, shapes)}")
    line = common.environment_line(found)
    drawn = draw(bench, shapes, line, args.dry_run)
    common.write("benchmark_decode", args, {"environment": found, "rows": common.as_dicts(bench.rows)}, drawn)


if __name__ == "__main__":
    main()
