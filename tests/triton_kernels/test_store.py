# SPDX-License-Identifier: Apache-2.0
"""The store kernels against the torch path and against float64.

What the kernels may do differently from exact arithmetic on the same fp16 operands: a rotated element is off by at most
`Step.slack` (float32 sums of D products). A code may then differ only where an element lies that close to the boundary
of two codes; scale and zero, or the norm, only by the same and their fp16 rounding; a sign only where the product with
the row of S is as close to zero.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from vllm_kvcompress.attention.plan import MIN_TOKENS_FOR_OWN_MEAN, make_plan
from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS, page_fields, write_tokens
from vllm_kvcompress.kernels import torch_attention
from vllm_kvcompress.quantizers import lloyd_max, packing, qjl
from vllm_kvcompress.triton_kernels.store import store

BLOCK = 16
FP16_MAX = 65504.0
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CODEBOOK_FORMATS = ["turboquant-4", "turboquant-3.5", "turboquant-3.5-qjl", "turboquant-2.5", "turboquant-2.5-qjl"]
SIGN_FORMATS = ["turboquant-3.5-qjl", "turboquant-2.5-qjl", "oscar-int2-qjl"]
OTHER_FORMATS = [*CODEBOOK_FORMATS, "oscar-int2-qjl"]
TWO_BIT_FORMATS = [name for name in format_names() if name not in OTHER_FORMATS]
MIXED = [(0, 140), (128, 1), (127, 3), (120, 40), (0, 5), (300, 0), (0, 0), (250, 8), (17, 90)]


class Step:
    """A random step: requests of (history, new) tokens whose histories are in the pages already.

    Bytes nobody wrote are 0xFF, in pages (where they read as NaN), windows and the buffer of new tokens. Padding's keys
    and values are NaN.
    """

    def __init__(
        self,
        requests,
        name="hadamard-int2",
        *,
        heads=2,
        dim=64,
        page_tokens=128,
        dtype=torch.bfloat16,
        rotated=True,
        window_dtype=torch.bfloat16,
        windows=True,
        new_rows=None,
        padding=3,
        missing=0.3,
    ):
        self.requests, self.heads, self.dim, self.page_tokens = requests, heads, dim, page_tokens
        self.format = get_format(name)
        self.layout = layout = self.format.layout(dim, page_tokens)
        past = torch.tensor([p for p, _ in requests])
        new = torch.tensor([n for _, n in requests])
        seq = past + new
        self.starts = torch.cat((torch.zeros(1), new.cumsum(0))).int()
        self.seq = seq.int()
        self.total = int(new.sum())
        rows = self.total + padding
        max_pages = max(1, -(-int(seq.max()) // page_tokens))
        count = len(requests) * max_pages
        self.table = (torch.randperm(count) + 1).view(len(requests), max_pages).int()
        # vLLM may pad between pages.
        head_bytes = layout.head_bytes
        padded = torch.full((count + 1, heads * head_bytes + 32), 0xFF, dtype=torch.uint8)
        self.pages = padded[:, : heads * head_bytes].view(count + 1, heads, head_bytes)
        fields = page_fields(self.pages, layout)
        for row, (history, _) in enumerate(requests):
            own = self.table[row, : -(-history // page_tokens)].long()
            if fields.k_mean is not None:
                fields.k_mean[own] = torch.randn(len(own), heads, dim).half()
            positions = torch.arange(history)
            slots = self.table[row].long()[positions // page_tokens] * page_tokens + positions % page_tokens
            write_tokens(self.pages, layout, slots, *torch.randn(2, history, heads, dim) + 1, 1.0, 1.0)

        # Views of a fused projection, as models make them.
        fused = torch.randn(rows, 3 * heads * dim)
        fused[:, heads * dim :] += torch.rand(2 * heads * dim) * 4 - 2  # channels have means of their own
        fused[self.total :] = torch.nan
        fused = fused.to(dtype)
        self.key = fused[:, heads * dim : 2 * heads * dim].view(rows, heads, dim)
        self.value = fused[:, 2 * heads * dim :].view(rows, heads, dim)
        self.slots = self._slots(self.table, page_tokens, rows)
        self.window_dtype = window_dtype
        self.windows = self.window_slots = None
        if windows:
            max_blocks = max(1, -(-int(seq.max()) // BLOCK))
            ids = torch.randperm(len(requests) * max_blocks) + 1
            window_table = ids.view(len(requests), max_blocks)
            window_table[torch.rand(window_table.shape) < missing] = 0
            row_bytes = heads * BLOCK * 4 * dim
            padded = torch.full((ids.numel() + 1, row_bytes + 64), 0xFF, dtype=torch.uint8)
            self.windows = padded[:, :row_bytes].view(-1, heads, BLOCK, 4 * dim)
            self.window_slots = self._slots(window_table, BLOCK, rows)
        self.new_rows = rows if new_rows is None else new_rows
        self.new_kv = torch.full((rows + 1, heads, 4 * dim), 0xFF, dtype=torch.uint8).view(window_dtype)

        def rotation():
            return torch.linalg.qr(torch.randn(heads, dim, dim))[0].half().contiguous()

        self.k_rotation, self.v_rotation = (rotation(), rotation()) if rotated else (None, None)
        self.k_mean = torch.randn(heads, dim) if self.format.centring == "static" else None
        self.clip_k, self.clip_v = 0.7 + 0.3 * torch.rand(heads), 0.7 + 0.3 * torch.rand(heads)
        self.max_query_len = max(1, int(new.max()))
        self.sketch = None
        if layout.keys.signs is not None:
            self.sketch = qjl.sketch_matrix(dim, 0, orthogonal=True).half().contiguous()

    def _slots(self, table, size, rows):
        slots = torch.full((rows,), -1)
        for row, (past, new) in enumerate(self.requests):
            positions = torch.arange(past, past + new)
            begin = int(self.starts[row])
            slots[begin : begin + new] = table[row].long()[positions // size] * size + positions % size
        return slots

    def run(self, device, **changed):
        """Store on `device`; `pages`, `windows` and `new_kv` are replaced by what was written."""

        def there(x):  # with its strides
            if x is None or x.device == device:
                return x
            base = x if x._base is None else x._base.view(x.dtype)
            return torch.as_strided(base.to(device), x.shape, x.stride(), x.storage_offset())

        pages, windows, new_kv = there(self.pages), there(self.windows), there(self.new_kv)
        store(
            pages,
            self.layout,
            there(self.key),
            there(self.value),
            there(self.slots),
            there(self.starts),
            there(self.seq),
            there(self.table),
            **{
                "k_rotation": there(self.k_rotation),
                "v_rotation": there(self.v_rotation),
                "k_mean": there(self.k_mean),
                "clip_k": there(self.clip_k),
                "clip_v": there(self.clip_v),
                "window_cache": windows,
                "window_slots": there(self.window_slots),
                "window_dtype": self.window_dtype,
                "new_kv": None if self.new_rows == 0 else new_kv[: self.new_rows],
                "max_query_len": self.max_query_len,
                "sketch": there(self.sketch),
                **changed,
            },
        )
        self.interpreted = pages.device.type == "cpu"
        self.pages, self.new_kv = pages.cpu(), new_kv.cpu()
        self.windows = None if windows is None else windows.cpu()

    def exact(self):
        """Keys and values in cache space, [rows, H, D] float64, from the operands that the kernels are to use."""
        k, v = self.key.float(), self.value.float()
        if self.k_mean is not None:
            k = k - self.k_mean
        if self.k_rotation is None:
            return k.double(), v.double()
        pairs = ((k, self.k_rotation), (v, self.v_rotation))
        return [
            torch.einsum("thd,hde->the", x.clamp(-FP16_MAX, FP16_MAX).half().double(), r.double()) for x, r in pairs
        ]

    def slack(self, exact):
        """[rows, H, 1]: how far float32 sums of D products may be off.

        Each of D additions rounds to 2^-24 (a tensor core truncates to 2^-23) of a partial sum, at most |x| |r|, and
        |r| is 1 up to fp16 rounding.
        """
        return exact.norm(dim=-1, keepdim=True) * (0 if self.k_rotation is None else self.dim * 2.0**-23)

    def plan(self):
        metadata = SimpleNamespace(
            query_start_loc=self.starts,
            seq_lens=self.seq,
            block_table=self.table,
            slot_mapping=self.slots,
            page_tokens=self.page_tokens,
            centres_pages=self.layout.k_mean is not None,
            sink_tokens=0,
            recent_tokens=0,
        )
        return make_plan(metadata, None)

    def begun(self):
        """Pages begun in the step: [N] int64."""
        slots = self.slots[: self.total]
        return slots[(slots >= self.page_tokens) & (slots % self.page_tokens == 0)] // self.page_tokens


def half_ulp(value):
    """Largest rounding error of a float64 stored in fp16: 2^-11 of it, or 2^-25 below the normal range."""
    return value.abs() * 2.0**-11 + 2.0**-25


def check(step, device, **changed):
    """Run a step and check every byte of pages, windows and new tokens."""
    before = SimpleNamespace(pages=step.pages.clone(), new_kv=step.new_kv.clone())
    before.windows = None if step.windows is None else step.windows.clone()
    expected_means = None
    keys, values = step.exact()
    if step.layout.k_mean is not None:
        reference = before.pages.clone()
        torch_attention.store(
            reference, step.layout, step.plan(), keys.float(), values.float(), 1.0, 1.0, None, torch.bfloat16
        )
        expected_means = page_fields(reference, step.layout).k_mean[step.begun()].double()
    step.run(device, **changed)
    stored = (step.slots >= step.page_tokens).nonzero().squeeze(1)
    page, offset = step.slots[stored] // step.page_tokens, step.slots[stored] % step.page_tokens
    fields = page_fields(step.pages, step.layout)
    k, v = keys[stored], values[stored]
    slack_k, slack_v = step.slack(k), step.slack(v)
    # The float64 check leaves the page means out, the bytes of their pages included: they are checked here.
    if expected_means is not None:
        means = fields.k_mean[step.begun()].double()
        # Two fp16 roundings of sums that each carry up to 2 * page_tokens roundings of 2^-24 of the largest key.
        bound = 2 * half_ulp(expected_means) + step.page_tokens * 2.0**-22 * keys[: step.total].abs().amax()
        bound += read_back_slack(step, page_fields(before.pages, step.layout))
        assert ((means - expected_means).abs() <= bound).all()
        mean = fields.k_mean[page].double()
        k = k - mean
        peak = k.abs().amax(-1, keepdim=True)
        # What the affine quantiser saturates is exact again.
        slack_k = slack_k + 2.0**-24 * (
            peak.clamp(max=2 * FP16_MAX) if step.layout.keys.quantizer == "affine" else peak
        )
    for name, x, slack, clip, rows, field in (
        ("keys", k, slack_k, step.clip_k, step.layout.keys, fields.keys),
        ("values", v, slack_v, step.clip_v, step.layout.values, fields.values),
    ):
        if not len(x):
            continue
        read_back = []
        for part, packed, scales in zip(rows.parts, field.codes, field.scales, strict=True):
            codes, stored_scales = packing.unpack_bits(packed[page, :, offset], part.bits), scales[page, :, offset]
            channels = x[..., part.first_channel : part.first_channel + part.channels]
            if rows.quantizer == "affine":
                check_quantised(channels, slack, clip, codes, stored_scales, name)
                scale, zero = stored_scales.double().split(1, dim=-1)
                read_back.append(codes * scale + zero)
            else:
                check_codebook(channels, slack, codes, stored_scales, part.bits, field.signs is None, name)
                levels = lloyd_max.levels(part.channels, part.bits).double()
                read_back.append(levels[codes.int()] * stored_scales.double().unsqueeze(-1))
        if field.signs is not None:
            bits = packing.unpack_bits(field.signs[page, :, offset], 1)
            check_signs(x, torch.cat(read_back, dim=-1), slack, step.sketch, bits, field.sign_norms[page, :, offset])
    check_untouched_pages(step, before.pages, page, offset)
    check_sixteen_bits(step, before, keys, values)


def read_back_slack(step, fields):
    """How far a mean may be off for S in fp16, where the torch path has float32.

    A token's correction is sqrt(pi / 2) / D |r| S^T sign. An element of S is off by 2^-11 of it and the D products by
    as many roundings; the magnitudes of a column of D elements sum to sqrt(D) times its length, itself sqrt(D), at most
    (S has orthogonal rows of that length).
    """
    if step.sketch is None:
        return 0.0
    largest = fields.keys.sign_norms.double().nan_to_num(nan=0.0).amax()  # NaN where nobody wrote
    return math.sqrt(math.pi / 2) * largest * (2.0**-11 + step.dim * 2.0**-23)


def check_codebook(x, slack, codes, norms, bits, corrected, name):
    """Codes [M, H, C], norms [M, H] of rows x [M, H, C] float64 that are known up to slack [M, H, 1]."""
    channels = x.shape[-1]
    length = x.norm(dim=-1, keepdim=True)
    unit = x / length
    # The length is off by slack times the sum of |unit|, sqrt(C) at most; float32: the sum of C squares, whose root
    # halves the error, and no more than eight roundings of what is multiplied and divided.
    rounding = (channels / 2 + 8) * 2.0**-24
    unsure = slack / length * (1 + unit.abs() * math.sqrt(channels)) + unit.abs() * rounding
    edges = lloyd_max.boundaries(channels, bits).double()
    sure = (unit.unsqueeze(-1) - edges).abs().amin(-1) > unsure
    assert torch.equal(codes[sure].long(), torch.bucketize(unit, edges)[sure]), name
    assert sure.double().mean() > 0.97, "too few codes were checked"
    wanted = length.squeeze(-1)
    relative = (slack / length).squeeze(-1) * math.sqrt(channels) + rounding
    if corrected:
        # By the codes that are stored; their length is another sum of C squares.
        wanted = wanted / lloyd_max.levels(channels, bits).double()[codes.int()].norm(dim=-1)
        relative = relative + rounding
    wanted = wanted.clamp(max=FP16_MAX)
    assert ((norms.double() - wanted).abs() <= half_ulp(wanted) + relative * wanted).all(), name


def check_signs(x, read_back, slack, sketch, bits, norms):
    """Signs [M, H, D] and norms [M, H] of x - read_back [M, H, D] float64, x known up to slack [M, H, 1]."""
    dim = x.shape[-1]
    residual = x - read_back
    # x itself, what is read back (three products, a sum) and their difference in float32.
    slack = slack + 2.0**-22 * (x.abs() + read_back.abs()).amax(-1, keepdim=True)
    length = residual.norm(dim=-1, keepdim=True)
    unit = residual / length
    rounding = (dim / 2 + 8) * 2.0**-24  # as in check_codebook
    wanted = length.squeeze(-1).clamp(max=FP16_MAX)
    relative = (slack / length).squeeze(-1) * math.sqrt(dim) + rounding
    assert ((norms.double() - wanted).abs() <= half_ulp(wanted) + relative * wanted).all()
    # An element of the unit vector is off as in check_codebook, and by its rounding to fp16.
    unsure = slack / length * (1 + unit.abs() * math.sqrt(dim)) + unit.abs() * rounding + half_ulp(unit)
    matrix = sketch.double()
    # Sums of D products: as `Step.slack`.
    sums = dim * 2.0**-23 * matrix.norm(dim=-1)
    projected = unit @ matrix.mT
    sure = projected.abs() > unsure @ matrix.abs().mT + sums
    assert torch.equal(bits[sure] == 1, projected[sure] >= 0)
    assert sure.double().mean() > 0.95, "too few signs were checked"


def check_quantised(x, slack, clip, codes, scales, name):
    """Codes [M, H, D], scales [M, H, 2] of rows x [M, H, D] float64 that are known up to slack [M, H, 1]."""
    x = x.clamp(-FP16_MAX, FP16_MAX)
    scale, zero = scales.double().unbind(-1)
    assert torch.isfinite(scale).all() and torch.isfinite(zero).all(), name
    slack = slack + 2.0**-24 * x.abs().amax(-1, keepdim=True)  # x itself in float32
    low, high = x.amin(-1), x.amax(-1)
    middle = (low + high) / 2
    wanted = (high - low) * clip.double() / 3
    # Both ends are off by slack; three float32 operations.
    bound = half_ulp(wanted) + slack[..., 0] * 2 / 3 + wanted * 2.0**-22
    assert ((scale - wanted).abs() <= bound).all(), name
    step = scale.unsqueeze(-1)
    position = (x - middle.unsqueeze(-1)) / step + 2
    # x and middle are off by slack; products and sums in float32 of terms as large as x / step: four roundings.
    unsure = (2 * slack + 2.0**-22 * (x.abs() + middle.abs().unsqueeze(-1))) / step
    sure = (position - position.round()).abs() > unsure
    assert torch.equal(codes.double()[sure], position.clamp(0, 3.5).floor()[sure]), name
    assert sure.double().mean() > 0.98, "too few codes were checked"
    # The mean of D float32 numbers, off by slack, with D roundings.
    reference = x.mean(-1) - scale * codes.double().mean(-1)
    bound = half_ulp(reference) + slack[..., 0] + x.shape[-1] * 2.0**-24 * x.abs().amax(-1) + 2.0**-22 * scale
    assert ((zero - reference).abs() <= bound).all(), name


def check_untouched_pages(step, before, page, offset):
    """Only codes and scales of stored tokens and means of begun pages may have changed, and all of them have."""
    written = torch.zeros_like(step.pages)
    fields = page_fields(written, step.layout)
    ones = torch.tensor(-1, dtype=torch.int16).view(torch.float16)
    for rows in (fields.keys, fields.values):
        for codes in (*rows.codes, *([] if rows.signs is None else [rows.signs])):
            codes[page, :, offset] = 1
        for scales in (*rows.scales, *([] if rows.sign_norms is None else [rows.sign_norms])):
            scales[page, :, offset] = ones
    if fields.k_mean is not None:
        fields.k_mean[step.begun()] = ones
    untouched = written == 0
    assert torch.equal(step.pages[untouched], before[untouched])
    assert (step.pages[0] == 0xFF).all(), "the null page is never written"


def check_sixteen_bits(step, before, keys, values):
    exact = torch.cat((keys, values), dim=-1)
    slack = torch.cat((step.slack(keys).expand_as(keys), step.slack(values).expand_as(values)), dim=-1)
    # Half a unit of the last of 8 or 11 bits, and of fp16's subnormals. Triton's interpreter truncates to bfloat16.
    bits = 11 if step.window_dtype == torch.float16 else 7 if step.interpreted else 8
    if step.window_dtype == torch.float16:
        exact = exact.clamp(-FP16_MAX, FP16_MAX)
    bound = exact.abs() * 2.0**-bits + 2.0**-25 + slack
    rows = step.new_rows
    real = min(rows, step.total)
    assert ((step.new_kv[:real].double() - exact[:real]).abs() <= bound[:real]).all()
    assert torch.equal(step.new_kv[rows:].view(torch.uint8), before.new_kv[rows:].view(torch.uint8))
    if step.windows is None:
        return
    windowed = (step.window_slots >= BLOCK).nonzero().squeeze(1)
    block, offset = step.window_slots[windowed] // BLOCK, step.window_slots[windowed] % BLOCK
    found = step.windows[block, :, offset].view(step.window_dtype)
    assert ((found.double() - exact[windowed]).abs() <= bound[windowed]).all()
    both = windowed[windowed < rows]
    assert torch.equal(found[: len(both)].view(torch.uint8), step.new_kv[both].view(torch.uint8))
    if step.k_rotation is None and step.key.dtype == step.window_dtype and step.k_mean is None:
        assert torch.equal(found, torch.cat((step.key, step.value), dim=-1)[windowed]), "a copy must be exact"
    written = torch.zeros(step.windows.shape, dtype=torch.bool)
    written[block, :, offset] = True
    assert torch.equal(step.windows[~written], before.windows[~written])
    assert (step.windows[0] == 0xFF).all(), "the null block is never written"


@pytest.mark.parametrize("name", TWO_BIT_FORMATS)
@pytest.mark.parametrize("rotated", [True, False])
def test_mixed_batch(name, rotated, device):
    check(Step(MIXED, name, rotated=rotated), device)


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_codebooks_and_signs(name, device):
    """Begun pages with means of their own and borrowed ones (from codes and signs), tokens that are not stored."""
    step = Step([(0, 35), (128, 1), (127, 3), (0, 0)], name)
    step.slots[torch.tensor([2, 11])] = torch.tensor([-1, 3])
    check(step, device)


@pytest.mark.parametrize("dim", [96, 128, 256])
@pytest.mark.parametrize("name", ["turboquant-3.5", "turboquant-2.5-qjl", "oscar-int2-qjl"])
def test_head_sizes_of_codebooks_and_signs(dim, name, device):
    """Parts of 24, 32, 48, 64, 72, 96, 128 and 192 channels."""
    check(Step([(120, 12)], name, heads=1, dim=dim), device)


def test_large_tiles_of_codebooks_and_signs(device):
    check(Step([(5, 300)], "turboquant-2.5-qjl", heads=1, missing=0.9, new_rows=0), device)


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("tokens", [(30, 4), (120, 180)], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("rotated", [True, False])
def test_head_sizes(dim, tokens, rotated, device):
    check(Step([(100, tokens[0]), (126, tokens[1])], heads=1, dim=dim, rotated=rotated), device)


def test_long_prefill(device):
    """More than 2048 tokens take the largest tile, and every page of them is found by the search over requests."""
    check(Step([(5, 3), (100, 1900), (0, 1), (0, 150), (128, 1)], heads=1, missing=0.9, new_rows=0), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotated", [True, False])
def test_dtypes(dtype, window_dtype, rotated, device):
    for name in ("oscar-int2", "oscar-int2-static"):
        check(Step([(120, 20)], name, heads=1, dtype=dtype, window_dtype=window_dtype, rotated=rotated), device)


@pytest.mark.parametrize("name", TWO_BIT_FORMATS)
def test_without_rotation_every_bit_is_the_torch_path_s(name, device):
    """Same float32 operations: codes differ only on a boundary (a fused multiply-add), the mean only in its sum."""
    step = Step([(120, 30), (40, 20), (0, 3)], name, rotated=False, dtype=torch.float32)
    keys, values = step.exact()
    step.run(device)
    expected = step.pages.clone()
    stored = (step.slots >= step.page_tokens).nonzero().squeeze(1)
    slots = step.slots[stored]
    args = (expected, step.layout, slots, keys[stored].float(), values[stored].float(), step.clip_k, step.clip_v)
    write_tokens(*args)  # around the means that the kernel has set
    page, offset = slots // step.page_tokens, slots % step.page_tokens
    ours, torchs = page_fields(step.pages, step.layout), page_fields(expected, step.layout)
    for side in ("k", "v"):
        a, b = (getattr(f, f"{side}_scales")[page, :, offset] for f in (ours, torchs))
        assert torch.equal(a[..., 0], b[..., 0]), "scales"
        codes_a, codes_b = (packing.unpack(getattr(f, f"{side}_codes")[page, :, offset]) for f in (ours, torchs))
        differ = codes_a != codes_b
        # A position on the boundary of two codes within 2^-20: one in 10^5 at most.
        assert differ.double().mean() < 1e-4
        assert (codes_a.int() - codes_b.int()).abs().max() <= 1
        # Sums in another order: the neighbour of an fp16 number at most.
        same = ~differ.any(-1)
        zeros_a, zeros_b = a[..., 1][same].double(), b[..., 1][same].double()
        assert ((zeros_a - zeros_b).abs() <= 2 * half_ulp(zeros_b)).all()
        assert (zeros_a == zeros_b).double().mean() > 0.9


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_without_rotation_codebooks_and_signs_are_the_torch_path_s(name, device):
    """Same float32 numbers: what differs was on a boundary or, of the signs, where fp16 rounds them over zero."""
    step = Step([(120, 12), (0, 3)], name, rotated=False, dtype=torch.float32)
    keys, values = step.exact()
    step.run(device)
    expected = step.pages.clone()
    slots = step.slots[: step.total]
    k, v = keys[: step.total].float(), values[: step.total].float()
    write_tokens(expected, step.layout, slots, k, v, step.clip_k, step.clip_v)  # around the kernel's means
    page, offset = slots // step.page_tokens, slots % step.page_tokens
    for side in ("keys", "values"):
        rows = getattr(step.layout, side)
        ours, torchs = (getattr(page_fields(pages, step.layout), side) for pages in (step.pages, expected))
        same = torch.ones(len(slots), step.heads, dtype=torch.bool)
        for index, part in enumerate(rows.parts):
            a, b = (packing.unpack_bits(f.codes[index][page, :, offset], part.bits) for f in (ours, torchs))
            # Float32 unit vectors, as check_codebook, differ by 2^-24 * (D / 2 + 8) < 2^-18 of an element, itself about
            # 1 / sqrt(D), and the narrowest code of 4 bits is 0.25 / sqrt(D) wide: one element in 2^15 is in doubt.
            assert (a != b).sum() <= 1 + a.numel() * 2.0**-15 and (a.int() - b.int()).abs().max() <= 1
            equal = (a == b).all(-1)
            a, b = (f.scales[index][page, :, offset].double() for f in (ours, torchs))
            # Sums in another order: the neighbour of an fp16 number at most.
            assert ((a - b).abs() <= 2 * half_ulp(b))[equal].all() and (a == b)[equal].double().mean() > 0.9
            same &= equal & (a == b).view(*same.shape, -1).all(-1)
        if rows.signs is None:
            continue
        a, b = (packing.unpack_bits(f.signs[page, :, offset], 1)[same] for f in (ours, torchs))
        # A product of a unit vector and a row of S, about N(0, 1), is off by the fp16 rounding of both, at most
        # 2 * 2^-11 * sqrt(D) < 0.01, and within 0.01 of zero with a probability of 0.8 %.
        assert (a != b).double().mean() < 0.02
        a, b = (f.sign_norms[page, :, offset][same].double() for f in (ours, torchs))
        assert ((a - b).abs() <= 2 * half_ulp(b)).all() and (a == b).double().mean() > 0.9


BEGUN = [
    (0, 300),  # own means, the last of 44 tokens
    (128, 1),  # of one token: the previous page, all of it old
    (127, 3),  # the previous page completed in this very step
    (120, 40),  # own mean of 32 tokens, just enough
    (120, 39),  # one too few: 120 old and 8 new
    (0, 135),  # the previous page begun and completed in this step
    (100, 160),  # the same after a page that was begun before
    (0, 5),  # no previous page: few tokens are enough
    (3, 20),  # none begun
    (256, 31),
    (250, 0),
]


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("page_tokens", [128, 256])
def test_page_means(rotated, page_tokens, device):
    scale = page_tokens // 128
    requests = [(past * scale, new * scale if new > 100 else new) for past, new in BEGUN]
    step = Step(requests, page_tokens=page_tokens, heads=1, rotated=rotated, windows=False, new_rows=0)
    assert len(step.begun()) >= 12
    check(step, device)


def test_every_request_begins_a_page_at_once(device):
    """A decode step of more requests than one search block, some of them padding."""
    requests = [(128, 1)] * 20 + [(0, 0)] * 250 + [(256, 1)] * 3 + [(0, 130)]
    step = Step(requests, heads=1, windows=False, new_rows=0)
    assert len(step.begun()) == 25
    check(step, device)


@pytest.mark.parametrize("new", range(1, 9))
def test_decode_steps_across_a_page_boundary(new, device):
    """One and up to seven drafts; every place of the boundary among them, and none."""
    check(Step([(128 - before, new) for before in range(new + 2)], heads=1, padding=1), device)


def test_own_means_need_enough_tokens(device):
    """The comparison with the torch path would hold if both sides never borrowed."""
    step = Step([(128, MIN_TOKENS_FOR_OWN_MEAN - 1), (128, MIN_TOKENS_FOR_OWN_MEAN)], heads=1, rotated=False)
    first, second = step.begun().tolist()
    keys, _ = step.exact()
    own = [keys[: MIN_TOKENS_FOR_OWN_MEAN - 1].mean(0), keys[MIN_TOKENS_FOR_OWN_MEAN - 1 : step.total].mean(0)]
    step.run(device)
    means = page_fields(step.pages, step.layout).k_mean.double()
    assert (means[second] - own[1]).abs().max() < 1e-2 < (means[first] - own[0]).abs().max()


def test_tokens_that_are_not_stored(device):
    """Slots -1 and inside the null page, in the middle of requests: not written, and in no mean."""
    step = Step([(120, 20), (0, 60), (128, 3)])
    unstored = torch.tensor([2, 11, 25, 26, 79])
    step.slots[unstored] = torch.tensor([-1, 3, -1, step.page_tokens - 1, -1])
    step.window_slots[unstored[::2]] = torch.tensor([-1, 5, -1])
    check(step, device)
    # A page whose first token is not stored is not begun: it keeps the mean it has.
    step = Step([(0, 40)])
    step.slots[0] = -1
    page_fields(step.pages, step.layout).k_mean[step.table[0, 0]] = 0.5
    check(step, device)


@pytest.mark.parametrize("name", ["oscar-int2", "oscar-int2-static"])
def test_dummy_run_writes_nothing(name, device):
    """Graph capture: null tables, slots -1, sequence lengths that mean nothing."""
    step = Step([(700, 4)] * 3 + [(0, 0)] * 2, name, heads=1, new_rows=0)
    step.table.zero_()
    step.slots.fill_(-1)
    step.window_slots.fill_(-1)
    step.seq[:] = torch.tensor([100_000, 0, 2, 0, 77])
    before = step.pages.clone(), step.windows.clone()
    step.run(device)
    assert torch.equal(step.pages, before[0]) and torch.equal(step.windows, before[1])


def test_a_null_previous_page_is_not_borrowed_from(device):
    step = Step([(128, 3), (127, 5)], heads=1)
    step.table[:, 0] = 0
    step.slots[3] = 0  # the token that would complete the null page
    check(step, device)


def test_no_tokens(device):
    step = Step([(100, 0), (0, 0)], padding=0)
    before = step.pages.clone(), step.windows.clone()
    step.run(device)
    assert torch.equal(step.pages, before[0]) and torch.equal(step.windows, before[1])


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("new_rows", [0, 1, 21])
def test_optional_outputs(windows, new_rows, device):
    """Rows of new_kv: none, fewer than tokens, all but padding."""
    check(Step([(120, 20), (3, 1)], heads=1, windows=windows, new_rows=new_rows), device)


def test_new_kv_of_more_rows_than_tokens(device):
    step = Step([(3, 6)], heads=1, padding=0, new_rows=7)
    before = step.new_kv.clone()
    step.run(device)
    assert torch.equal(step.new_kv[6:].view(torch.uint8), before[6:].view(torch.uint8))
    assert torch.isfinite(step.new_kv[:6]).all()


def test_tokens_only_in_windows(device):
    """A window slot without a page slot: the 16-bit copy alone."""
    step = Step([(0, 5)], heads=1, new_rows=0, missing=0.0)
    step.slots.fill_(-1)
    check(step, device)


def test_flat_rows(device):
    """Constant rows, and rows flatter than fp16 can say: scale 0, zero the middle, as in the torch path."""
    step = Step([(0, 6)], "int2", heads=1, rotated=False, dtype=torch.float32)
    values = torch.tensor([0.0, 0.1, -3.7, 1e-7, 6e4, 2.0])
    step.key.copy_(torch.cat((values, torch.full((3,), torch.nan))).view(-1, 1, 1).expand_as(step.key))
    step.key[5, :, ::2] += 1e-8
    step.value.copy_(step.key)
    expected = step.pages.clone()
    write_tokens(expected, step.layout, step.slots[:6], step.key[:6], step.value[:6], step.clip_k, step.clip_v)
    step.run(device)
    assert torch.equal(step.pages, expected)


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_rows_of_zeros(name, device):
    """Norms 0, the codes and signs of zero, and every read is zero."""
    step = Step([(0, 6)], name, heads=1, rotated=False, dtype=torch.float32)
    step.key[: step.total], step.value[: step.total] = 0, 0
    expected = step.pages.clone()
    page_fields(expected, step.layout).k_mean[step.begun()] = 0
    k, v = step.key[: step.total], step.value[: step.total]
    write_tokens(expected, step.layout, step.slots[: step.total], k, v, step.clip_k, step.clip_v)
    step.run(device)
    assert torch.equal(step.pages, expected)


# Rotating casts to fp16: from 1e-30 it leaves nothing, and saturates elements where 1e36 saturates norms alone.
@pytest.mark.parametrize(
    ("magnitude", "rotated"), [(1e-30, False), (1e-3, True), (1e6, False), (1e6, True), (1e36, False), (1e36, True)]
)
def test_codebooks_and_signs_at_any_magnitude(magnitude, rotated, device):
    """Codes and signs do not depend on it; norms saturate and vanish. Squares of 1e36 and 1e-30 are no float32."""
    step = Step([(0, 40)], "turboquant-3.5-qjl", heads=1, rotated=rotated, dtype=torch.float32)
    step.key[: step.total] *= magnitude
    step.value[: step.total] *= magnitude
    check(step, device)
    fields = page_fields(step.pages, step.layout)
    offset = step.slots[: step.total] % step.page_tokens
    for norms in (*fields.keys.scales, *fields.values.scales, fields.keys.sign_norms):
        assert torch.isfinite(norms[step.table[0, 0], :, offset]).all()


@pytest.mark.parametrize("magnitude", [65504.0, 1e6, 3e38])
def test_large_values_saturate(magnitude, device):
    """Without a rotation as the torch path does; with one, operands are clamped to fp16."""
    for rotated in (False, True):
        step = Step([(0, 40)], heads=1, rotated=rotated, dtype=torch.float32, window_dtype=torch.float16)
        step.key[: step.total, :, ::3] = -magnitude
        step.value[: step.total, :, ::3] = magnitude
        check(step, device)
        fields = page_fields(step.pages, step.layout)
        assert torch.isfinite(fields.k_mean[step.begun()]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotated", [True, False])
def test_broken_input_is_not_hidden(value, dtype, rotated, device):
    step = Step([(3, 9)], "int2", heads=2, rotated=rotated, dtype=dtype)
    step.key[4, 1, 7] = value
    exact = step.exact()[0].float()
    step.run(device)
    page, offset = step.slots[: step.total] // step.page_tokens, step.slots[: step.total] % step.page_tokens
    scales = page_fields(step.pages, step.layout).k_scales[page, :, offset]
    if rotated or value != value:
        assert torch.isnan(scales[4, 1]).all()
        assert torch.isnan(step.new_kv[4, 1]).any()
    else:
        # The quantiser saturates an infinity, like any magnitude above fp16's largest; the 16-bit copy keeps it.
        assert (scales[4, 1, 0] > 1e4) and exact[4, 1, 7] == value
        assert step.new_kv[4, 1, 7] == value
    scales[4, 1] = 0
    assert torch.isfinite(scales).all(), "no other token or head is affected"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["turboquant-3.5-qjl", "oscar-int2-qjl"])
@pytest.mark.parametrize("rotated", [True, False])
def test_broken_input_is_not_hidden_by_codebooks_and_signs(value, name, rotated, device):
    # In a page that was begun before: its mean is sound.
    step = Step([(3, 9)], name, rotated=rotated)
    step.key[4, 1, 7] = value
    step.run(device)
    page, offset = step.slots[: step.total] // step.page_tokens, step.slots[: step.total] % step.page_tokens
    keys = page_fields(step.pages, step.layout).keys
    # What saturates in the affine quantiser is left over.
    norms = [keys.sign_norms, *(keys.scales if step.layout.keys.quantizer == "lloyd-max" else [])]
    norms = torch.stack([field[page, :, offset] for field in norms])
    # Without a rotation the second part of the channels does not know of it.
    broken = norms[:, 4, 1] if rotated else norms[:2, 4, 1]
    assert torch.isnan(broken).all()
    norms[:, 4, 1] = 0
    assert torch.isfinite(norms).all(), "no other token or head is affected"


def test_refusals(device):
    step = Step([(3, 9)], heads=2)
    wrong = {
        "k_rotation": step.k_rotation.mT,
        "v_rotation": step.v_rotation.float(),
        "window_dtype": torch.float32,
        "window_cache": step.windows[:, :1],
        "window_slots": None,
        "new_kv": step.new_kv.float(),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError):
            step.run(device, **{name: value})
    sketch = qjl.sketch_matrix(64, 0).half()
    with pytest.raises(ValueError, match="sketch"):
        step.run(device, sketch=sketch)
    signed = Step([(3, 9)], "oscar-int2-qjl", heads=2)
    for wrong_sketch in (None, sketch.float(), sketch.mT, sketch[:32]):
        with pytest.raises(ValueError, match="sketch"):
            signed.run(device, sketch=wrong_sketch)
    step.slots = step.slots[1:]
    with pytest.raises(ValueError, match="slots"):
        step.run(device)
