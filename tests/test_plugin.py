# SPDX-License-Identifier: Apache-2.0
"""Registration, settings and the promise that other cache dtypes are untouched."""

from pathlib import Path

import pytest

from vllm_kvcompress import compat, plugin, recipes
from vllm_kvcompress.config import load_settings
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.formats import format_names, get_format, is_ours


def selector(dtype, head_size=64, **changes):
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(head_size, torch.bfloat16, dtype, None, **changes)


def choose(config):
    from vllm.platforms import current_platform

    return current_platform.get_attn_backend_cls(None, attn_selector_config=config, num_heads=8)


def test_register_is_idempotent(monkeypatch):
    from vllm.platforms import current_platform

    plugin.register()
    first = type(current_platform).__dict__["get_attn_backend_cls"]
    monkeypatch.setattr(plugin, "_registered", False)
    plugin.register()
    assert type(current_platform).__dict__["get_attn_backend_cls"] is first


@pytest.mark.parametrize("name", format_names())
def test_our_dtypes_get_our_backend(name):
    plugin.register()
    from vllm.utils.import_utils import resolve_obj_by_qualname

    assert resolve_obj_by_qualname(choose(selector(name))).page_format is get_format(name)


@pytest.mark.parametrize("name", ["auto", "fp8", "bfloat16"])
def test_other_dtypes_keep_the_platforms_backend(name):
    plugin.register()
    assert not is_ours(name)
    assert "kvcompress" not in choose(selector(name))


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"head_size": 80}, "head_size"),
        ({"has_sliding_window": True}, "sliding window"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mla": True}, "MLA"),
        ({"use_mm_prefix": True}, "multimodal"),
    ],
)
def test_unsupported_attention_is_refused_with_the_reason(changes, reason):
    plugin.register()
    with pytest.raises(KVCompressError, match=reason):
        choose(selector("hadamard-int2", **changes))


def test_version_outside_the_range_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.34.0")
    with pytest.raises(KVCompressError, match=r"0\.34\.0"):
        compat.check_version()


def test_settings_win_over_environment_over_recipe():
    environ = {"VLLM_KVCOMPRESS_SINK_TOKENS": "16", "VLLM_KVCOMPRESS_RECENT_TOKENS": "32"}
    settings = load_settings({"kvcompress": {"sink_tokens": 8}}, environ)
    assert settings.windows("Qwen/Qwen3-8B") == (8, 32)
    assert load_settings({}, {}).windows("Qwen/Qwen3-8B") == (128, 2048)
    assert load_settings({}, {}).windows("x") == (recipes.DEFAULT_SINK_TOKENS, recipes.DEFAULT_RECENT_TOKENS)
    rotation = load_settings({"kvcompress": {"rotation": "a.safetensors"}}, {}).rotation
    assert rotation == Path("a.safetensors")


@pytest.mark.parametrize(
    "given,words",
    [
        ({"sink_tokens": -1}, "sink_tokens=-1"),
        ({"recent_tokens": 1 << 20}, "recent_tokens=1048576"),
        ({"recent_tokens": "many"}, "recent_tokens='many'"),
        ({"windows": 3}, "windows=3"),
        ("oscar", "must be a JSON object"),
    ],
)
def test_bad_settings_name_the_value(given, words):
    with pytest.raises(KVCompressError, match=words):
        load_settings({"kvcompress": given}, {})
