# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' metadata: parts, tiles of history, CUDA-graph capture, and that nothing waits for the device."""

import random
from itertools import pairwise

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from vllm_kvcompress import plugin
from vllm_kvcompress.attention.gpu_metadata import group_requests, make_metadata, plan_tiles

PAGE, BLOCK = 128, 16


def common_metadata(requests, *, padded_tokens=0, bounds=True, device="cpu", max_pages=9, offset=0):
    """vLLM's metadata of (history, new) requests; `offset` shifts the tensors in memory, as a runner's buffers may."""
    new = [n for _, n in requests]
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor([past + n for past, n in requests], dtype=torch.int32)
    tokens = int(starts[-1]) + padded_tokens

    def shifted(tensor):
        return torch.cat((tensor.new_zeros(offset, *tensor.shape[1:]), tensor)).to(device)[offset:]

    return CommonAttentionMetadata(
        query_start_loc=shifted(starts),
        query_start_loc_cpu=starts,
        seq_lens=shifted(lengths),
        num_reqs=len(requests),
        num_actual_tokens=tokens,
        max_query_len=max(new),
        max_seq_len=int(lengths.max()),
        block_table_tensor=shifted(torch.randint(1, 1000, (len(requests), max_pages), dtype=torch.int32)),
        slot_mapping=shifted(torch.randint(PAGE, 1 << 20, (tokens,))),
        seq_lens_cpu_upper_bound=lengths if bounds else None,
    )


def random_batch(threshold):
    """Requests in vLLM's order: decodes first."""
    decodes = [(random.randrange(3000), random.randint(1, threshold)) for _ in range(random.randrange(6))]
    prefills = [
        (random.choice((0, random.randrange(5000))), random.randint(threshold + 1, 400))
        for _ in range(random.randrange(6))
    ]
    return decodes, prefills


@pytest.mark.parametrize("threshold", [1, 4])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_parts_are_slices_of_the_step(threshold, offset):
    for _ in range(50):
        decodes, prefills = random_batch(threshold)
        if not decodes + prefills:
            continue
        common = common_metadata(decodes + prefills, offset=offset)
        metadata = make_metadata(common, threshold, PAGE)
        assert (metadata.decodes is not None) == bool(decodes)
        assert (metadata.prefills is not None) == bool(prefills)
        begin = token = 0
        for part, requests in ((metadata.decodes, decodes), (metadata.prefills, prefills)):
            if part is None:
                continue
            end, tokens = begin + len(requests), sum(n for _, n in requests)
            assert (part.requests, part.tokens) == (slice(begin, end), slice(token, token + tokens))
            assert part.query_start_loc.tolist() == [sum(n for _, n in requests[:i]) for i in range(len(requests) + 1)]
            assert part.seq_lens.tolist() == [past + n for past, n in requests]
            assert torch.equal(part.block_table, common.block_table_tensor[begin:end])
            assert torch.equal(part.slot_mapping, common.slot_mapping[token : token + tokens])
            assert part.max_query_len >= max(n for _, n in requests)
            assert part.max_seq_len >= max(past + n for past, n in requests)
            begin, token = end, token + tokens
        if metadata.decodes is not None:
            assert metadata.decodes.max_query_len == threshold, "one variant of the kernels serves every step"
        if metadata.prefills is not None:
            assert metadata.prefill_history == [past for past, _ in prefills]


def test_prefills_lie_where_triton_expects_them():
    """Pointers and strides at multiples of 16, wherever the prefills begin and however wide vLLM's tables are."""
    for count in range(1, 6):
        common = common_metadata([(300, 1)] * count + [(700, 50), (0, 9), (260, 77)], max_pages=9, offset=1)
        metadata = make_metadata(common, 1, PAGE)
        part = metadata.prefills
        (group,) = metadata.history(1 << 14)
        tables = [part.block_table, group.block_table]
        vectors = [part.query_start_loc, part.seq_lens, part.slot_mapping, group.query_start_loc, group.seq_lens]
        vectors += [tile.cu_history for tile in group.tiles]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tables + vectors)
        assert all(table.stride(0) % 16 == 0 and table.stride(1) == 1 for table in tables)
        assert all(tensor.is_contiguous() for tensor in vectors)


def history_of(metadata, requests, workspace):
    """{(request, position): (tile, row)} of everything the tiles gather, from the device's numbers alone."""
    rows = {}
    part = metadata.prefills
    for number, group in enumerate(metadata.history(workspace)):
        tokens = range(group.tokens.start, group.tokens.stop)
        starts = [a - group.tokens.start for a in part.query_start_loc.tolist()]
        first = group.requests.start - part.requests.start
        count = group.requests.stop - group.requests.start
        assert group.query_start_loc.tolist() == starts[first : first + count + 1]
        assert len(tokens) == group.query_start_loc[-1]
        lengths = (group.seq_lens - group.query_start_loc.diff()).tolist()
        assert lengths == [past for past, _ in requests[first : first + count]]
        assert lengths[0] > 0 and lengths[-1] > 0
        assert group.max_query_len == max(n for _, n in requests[first : first + count])
        for tile in group.tiles:
            assert tile.tile_tokens % PAGE == 0 and tile.first_token % PAGE == 0 and tile.tile_tokens > 0
            cu = tile.cu_history.tolist()
            assert cu[0] == 0 and cu[-1] <= tile.rows <= workspace
            assert max(b - a for a, b in pairwise(cu)) <= tile.max_tokens
            for row, past in enumerate(lengths):
                for t in range(tile.first_token, min(past, tile.first_token + tile.tile_tokens)):
                    key = (first + row, t)
                    assert key not in rows, "read twice"
                    rows[key] = (number, tile.first_token, cu[row] + t - tile.first_token)
                count = max(0, min(past, tile.first_token + tile.tile_tokens) - tile.first_token)
                assert cu[row + 1] - cu[row] == count
    assert len(set(rows.values())) == len(rows), "two tokens in one row"
    return rows


@pytest.mark.parametrize("workspace", [PAGE, 3 * PAGE, 1024, 1 << 14])
def test_tiles_cover_all_history_once(workspace):
    for _ in range(20):
        decodes, prefills = random_batch(1)
        if not prefills:
            continue
        metadata = make_metadata(common_metadata(decodes + prefills), 1, PAGE)
        rows = history_of(metadata, prefills, workspace)
        assert rows.keys() == {(i, t) for i, (past, _) in enumerate(prefills) for t in range(past)}


def test_more_requests_than_pages_in_the_workspace():
    prefills = [(random.choice((0, 1, 130, 500)), 5) for _ in range(40)]
    metadata = make_metadata(common_metadata(prefills), 1, PAGE)
    groups = metadata.history(4 * PAGE)
    assert len(groups) == len(group_requests([past for past, _ in prefills], PAGE, 4 * PAGE)) > 1
    rows = history_of(metadata, prefills, 4 * PAGE)
    assert rows.keys() == {(i, t) for i, (past, _) in enumerate(prefills) for t in range(past)}


def test_short_histories_leave_their_share_to_long_ones():
    assert plan_tiles([100_000, 200, 300], PAGE, 1 << 14)[0] == (0, (16384 - 500) // PAGE * PAGE)
    assert plan_tiles([8192], PAGE, 1 << 14) == [(0, 8192)]
    assert plan_tiles([1000, 900], PAGE, 1 << 14) == [(0, 1024)]
    assert plan_tiles([0, 0], PAGE, 1 << 14) == []


def test_no_history_no_tiles():
    metadata = make_metadata(common_metadata([(0, 30), (0, 7)]), 1, PAGE)
    assert metadata.history(1 << 14) == ()


def test_lengths_are_upper_bounds():
    """Where vLLM only has an upper bound, tiles may be empty, and what the device says decides."""
    prefills = [(0, 30), (700, 20)]
    metadata = make_metadata(common_metadata(prefills, bounds=False), 1, PAGE)
    assert all(bound >= past for bound, (past, _) in zip(metadata.prefill_history, prefills, strict=True))
    part = metadata.prefills
    (group,) = metadata.history(1 << 14)
    lengths = (part.seq_lens - part.query_start_loc.diff()).tolist()
    assert group.tiles[0].cu_history.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize("requests", [[(900, 1)] * 5, [(900, 1), (5, 1), (0, 40), (1500, 300)]])
def test_nothing_waits_for_the_device(requests):
    """Tensors without data: whoever asks for a value of theirs raises."""
    common = common_metadata(requests, device="meta")
    metadata = make_metadata(common, 1, PAGE)
    for group in metadata.history(1024):
        assert group.tiles[0].cu_history.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        common.seq_lens.cpu()


def test_decodes_are_views_of_the_runners_tensors():
    """A captured graph reads these addresses again in later steps; padding is part of it."""
    common = common_metadata([(900, 1)] * 3 + [(0, 0)] * 2, padded_tokens=2, offset=1)
    common.max_query_len = 1
    part = make_metadata(common, 1, PAGE).decodes
    assert part.num_tokens == 5 and part.seq_lens.shape == (5,)
    for mine, theirs in (
        (part.query_start_loc, common.query_start_loc),
        (part.seq_lens, common.seq_lens),
        (part.block_table, common.block_table_tensor),
        (part.slot_mapping, common.slot_mapping),
    ):
        assert mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """Configurations of a small random model with `hadamard-int2`, as `vllm serve` builds them."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)

    def make(kernels, **arguments):
        return EngineArgs(
            model=str(folder),
            kv_cache_dtype="hadamard-int2",
            max_model_len=512,
            skip_tokenizer_init=True,
            additional_config={"kvcompress": {"kernels": kernels}},
            **arguments,
        ).create_engine_config()

    return make


def builders(config):
    from vllm_kvcompress.attention.backend import KVCompressMetadataBuilder
    from vllm_kvcompress.attention.pages import PageSpec
    from vllm_kvcompress.attention.window_layer import WindowMetadataBuilder
    from vllm_kvcompress.attention.windows import make_window_spec

    spec = PageSpec(block_size=PAGE, num_kv_heads=2, head_size=64, dtype=torch.uint8, state_content_bytes=41)
    window_spec = make_window_spec(spec, config, 16, 64)
    device = torch.device("cpu")
    return (
        KVCompressMetadataBuilder(spec, ["layer"], config, device),
        WindowMetadataBuilder(window_spec, ["layer.window"], config, device),
    )


def test_builders_on_the_torch_path(configure, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for kernels in ("torch",) if torch.cuda.is_available() else ("auto", "torch"):
        config = configure(kernels)
        for builder in builders(config):
            assert builder.get_cudagraph_support(config, builder.kv_cache_spec) == AttentionCGSupport.NEVER
            assert builder.get_varlen_cudagraph_max_query_len(config, builder.kv_cache_spec) is None
            assert builder.reorder_batch_threshold is None, "the order of a batch is as it was"
        metadata = builders(config)[0].build(0, common_metadata([(5, 1), (0, 9)]))
        assert metadata.plan(None).groups


def test_builders_on_the_gpu_path(configure, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = configure("triton")
    main, window = builders(config)
    for builder in (main, window):
        assert builder.get_cudagraph_support(config, builder.kv_cache_spec) == AttentionCGSupport.UNIFORM_BATCH
        assert builder.get_varlen_cudagraph_max_query_len(config, builder.kv_cache_spec) == 1
    assert main.reorder_batch_threshold == 1 and window.reorder_batch_threshold is None
    assert window.kv_cache_spec.rollback_tokens == 0
    requests = [(700, 1), (0, 9), (200, 40)]
    common = common_metadata(requests)
    metadata = main.build(0, common)
    assert metadata.page_tokens == PAGE and metadata.decodes.num_tokens == 1
    windows = window.build(0, common)
    part = metadata.prefills
    assert torch.equal(windows.table(part), common.block_table_tensor[1:])
    assert torch.equal(windows.slots(part), common.slot_mapping[1:])
    assert windows.slots(part) is windows.slots(part), "made once for all layers"
    (group,) = metadata.history(1 << 14)
    assert torch.equal(windows.table(group), common.block_table_tensor[2:])


def test_drafts_are_decoded(configure, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = configure(
        "triton", speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    )
    main, window = builders(config)
    assert window.kv_cache_spec.rollback_tokens == 3 * config.max_concurrent_batches
    assert main.reorder_batch_threshold == 4
    assert main.get_varlen_cudagraph_max_query_len(config, main.kv_cache_spec) == 4
    metadata = main.build(0, common_metadata([(700, 4), (300, 1), (0, 5)]))
    assert metadata.decodes.num_tokens == 5 and metadata.prefills.num_tokens == 5


def test_capture_leaves_vllms_tensors_alone(configure, monkeypatch):
    """Null tables, slots of -1, lengths of the dummy batch: what vLLM keeps in them is not written."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    main, window = builders(configure("triton"))
    common = common_metadata([(0, 1)] * 4)
    common.block_table_tensor.zero_()
    common.slot_mapping.fill_(-1)
    common.max_seq_len = 512
    before = [t.clone() for t in (common.query_start_loc, common.seq_lens, common.block_table_tensor)]
    metadata = main.build_for_cudagraph_capture(common)
    window.build_for_cudagraph_capture(common)
    assert metadata.prefills is None and metadata.decodes.max_seq_len == 512
    for tensor, old in zip((common.query_start_loc, common.seq_lens, common.block_table_tensor), before, strict=True):
        assert torch.equal(tensor, old)
