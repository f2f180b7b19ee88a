# SPDX-License-Identifier: Apache-2.0
"""Tests that need a GPU (`make test-gpu`). Elsewhere they are skipped with the reason."""

import pytest
import torch


def missing_gpu() -> str | None:
    """Why GPU tests cannot run here, None if they can."""
    if not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__})"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    return None


def pytest_collection_modifyitems(items):
    reason = missing_gpu()
    if reason:
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture(autouse=True)
def _fresh_seed():
    """Every run draws new inputs; the seed is printed with a failure."""
    seed = torch.seed() & 0x7FFFFFFF
    torch.manual_seed(seed)
    print(f"seed {seed}")
    torch.backends.cuda.matmul.allow_tf32 = False


class Step:
    """A random step over filled caches on the GPU.

    Bytes nobody wrote are 0xFF, which reads as NaN: in the null page and block, behind the end of every history, and
    in whatever pages no request owns.
    """

    def __init__(
        self,
        requests,
        *,
        heads,
        group,
        dim,
        page_format,
        sinks=0,
        recent=0,
        missing=0.0,
        null_pages=0.0,
        window_dtype=torch.bfloat16,
        padding=0,
        out_dtype=torch.float16,
        query_scale=1.0,
        block=16,
    ):
        from vllm_kvcompress.formats.base import PAGE_TOKENS, page_fields, sketch_matrix

        device = torch.device("cuda")
        self.page_tokens, self.block = PAGE_TOKENS, block
        self.layout = page_format.layout(dim, PAGE_TOKENS)
        self.heads, self.group, self.dim = heads, group, dim
        self.sinks, self.recent, self.window_dtype = sinks, recent, window_dtype
        self.scale = dim**-0.5 * query_scale
        past = torch.tensor([p for p, _ in requests], dtype=torch.int32)
        new = torch.tensor([n for _, n in requests], dtype=torch.int32)
        self.max_query_len = max(int(new.max()), 1)
        seq = past + new
        max_pages = max(1, -(-int(seq.max()) // PAGE_TOKENS))
        max_blocks = max(1, -(-int(seq.max()) // self.block))
        counts = -(-seq // PAGE_TOKENS)
        # Only pages that requests own exist, in random order; the rest of a row of the table is null.
        total = int(counts.sum())
        ids = (torch.randperm(total) + 1).int()
        table = torch.zeros(len(requests), max_pages, dtype=torch.int32)
        table[torch.arange(max_pages) < counts.unsqueeze(1)] = ids
        if null_pages:
            table[torch.rand(table.shape) < null_pages] = 0
        self.table = table.to(device)
        self.pages = torch.randint(0, 256, (total + 1, heads, self.layout.head_bytes), dtype=torch.uint8, device=device)
        fields = page_fields(self.pages, self.layout)
        rows = ((fields.keys, self.layout.keys), (fields.values, self.layout.values))
        for field, row in rows:
            for part, scales in zip(row.parts, field.scales, strict=True):
                if row.quantizer == "affine":
                    step = 0.2 + 0.3 * torch.rand(scales.shape[:-1], device=device)
                    scales[..., 0] = step.half()
                    scales[..., 1] = (-1.5 * step + 0.1 * torch.randn_like(step)).half()
                else:  # norms of rows whose channels are of the order of 0.5
                    scales.copy_((0.2 + 0.6 * torch.rand(scales.shape, device=device)) * part.channels**0.5)
        if fields.keys.sign_norms is not None:
            fields.keys.sign_norms.copy_(0.2 * torch.rand(fields.keys.sign_norms.shape, device=device) * dim**0.5)
        if fields.k_mean is not None:
            fields.k_mean.copy_(torch.randn(fields.k_mean.shape, device=device))
        for row, (history, _) in enumerate(requests):
            if history % PAGE_TOKENS and self.table[row, history // PAGE_TOKENS]:
                page = int(self.table[row, history // PAGE_TOKENS])
                for field, _ in rows:
                    signs = () if field.signs is None else (field.signs, field.sign_norms)
                    for written in (*field.codes, *field.scales, *signs):
                        rest = written[page, :, history % PAGE_TOKENS :]
                        rest.fill_(0xFF if written.dtype == torch.uint8 else torch.nan)
        self.pages[0] = 0xFF
        self.window_cache = self.window_table = None
        if sinks or recent:
            blocks = -(-seq // self.block)
            total = int(blocks.sum())
            window_table = torch.zeros(len(requests), max_blocks, dtype=torch.int32)
            window_table[torch.arange(max_blocks) < blocks.unsqueeze(1)] = (torch.randperm(total) + 1).int()
            window_table[torch.rand(window_table.shape) < missing] = 0
            self.window_table = window_table.to(device)
            cache = torch.randn(total + 1, heads, self.block, 2 * dim, device=device).to(window_dtype)
            self.window_cache = cache.view(torch.uint8)
            self.window_cache[0] = 0xFF
            for row, (history, _) in enumerate(requests):
                if history % self.block:
                    block = int(self.window_table[row, history // self.block])
                    self.window_cache[block, :, history % self.block :] = 0xFF
        starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
        starts[1:] = new.cumsum(0)
        self.starts, self.seq = starts.to(device), seq.to(device)
        self.num_tokens = int(starts[-1])
        rows = self.num_tokens + padding
        self.q = torch.randn(rows, heads * group, dim, device=device).half()
        self.q_signs = None
        if self.layout.keys.signs is not None:
            self.q_signs = (self.q.float() @ sketch_matrix(dim).to(device).mT).half()
        self.new_kv = torch.randn(rows, heads, 2 * dim, device=device).to(window_dtype)
        self.out = torch.full((rows, heads * group, dim), torch.nan, dtype=out_dtype, device=device)
        rotation = torch.linalg.qr(torch.randn(heads, dim, dim, device=device))[0]
        self.v_unrotation = rotation.half().contiguous()

    def reference(self, unrotate=True, dtype=torch.float32):
        """[num_tokens, Hq, D] in float32."""
        from vllm_kvcompress.kernels.reference import attend_reference

        keys, values = self.new_kv[: self.num_tokens].chunk(2, dim=-1)
        out = attend_reference(
            self.q[: self.num_tokens],
            keys,
            values,
            self.pages,
            self.layout,
            self.table,
            self.starts,
            self.seq,
            self.scale,
            self.window_cache,
            self.window_table,
            self.sinks,
            self.recent,
            self.window_dtype,
            dtype=dtype,
        )
        if unrotate:
            out = torch.einsum("thge,hed->thgd", out.unflatten(1, (self.heads, -1)), self.v_unrotation.to(dtype))
            out = out.flatten(1, 2)
        return out


@pytest.fixture
def make_step():
    return Step


@pytest.fixture
def worst_error():
    """Largest relative error of a row (token and query head), in the 2-norm; NaN counts as infinite."""

    def measure(got: torch.Tensor, expected: torch.Tensor) -> float:
        assert torch.isfinite(expected).all(), "the oracle itself must be finite"
        error = (got.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
        return float(error.nan_to_num(torch.inf).max()) if error.numel() else 0.0

    return measure
