# SPDX-License-Identifier: Apache-2.0
"""The demo's table: its bytes are the layouts' bytes, its tokens follow from them."""

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from vllm_kvcompress.capacity.geometry import Geometry, head_bytes_per_token, read_geometry
from vllm_kvcompress.demo.capacity import table
from vllm_kvcompress.formats import format_names, get_format

SMOLLM2 = Geometry(num_layers=30, num_kv_heads=3, head_dim=64, max_positions=8192)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes(head_dim):
    assert head_bytes_per_token("auto", head_dim) == head_bytes_per_token("bfloat16", head_dim) == 4 * head_dim
    for name in format_names():
        assert head_bytes_per_token(name, head_dim) == get_format(name).layout(head_dim, 128).bytes_per_token


def test_table():
    lines = table(SMOLLM2, "int2", memory_bytes=1 << 30, max_model_len=8192, vllm_tokens=100_000).splitlines()
    cells = [line.split() for line in lines]
    # 30 layers x 3 heads; 2 x 64 x 2 bytes in bf16; 2 x (16 + 4) bytes in int2.
    assert cells[2][-3:] == ["256", "40", "6.4x"]
    assert cells[3][-3:] == ["23,040", "3,600", "6.4x"]
    assert cells[4][-3:] == [f"{(1 << 30) // 23_040:,}", f"{(1 << 30) // 3_600:,}", "6.4x"]
    assert cells[5][-3:] == ["46,603", "100,000", "2.1x"]


def test_geometry_is_read_from_the_config(tmp_path):
    LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    assert read_geometry(tmp_path) == SMOLLM2


def test_only_layers_that_grow_are_counted(tmp_path):
    Gemma3TextConfig(num_hidden_layers=18, num_key_value_heads=1, head_dim=256, sliding_window=512).save_pretrained(
        tmp_path
    )
    assert read_geometry(tmp_path).num_layers == 3
