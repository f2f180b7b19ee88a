# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused in the process the user started: the reason, the value, the way out."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from vllm_kvcompress import checks, plugin, recipes, rotations
from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations import LayerRotation, RotationMetadata, RotationSet

LAYERS, HEADS, DIM = 2, 2, 64
NGRAM = {"method": "ngram", "prompt_lookup_max": 2}
SLIDING, FULL = "sliding_attention", "full_attention"


def save_model(folder: Path, **changes) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=512,
    )
    config.update(changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_KVCOMPRESS_CACHE", str(tmp_path / "cache"))
    plugin.register()


def rotation_set(fingerprint, layers=LAYERS, heads=HEADS, dim=DIM):
    def orthogonal():
        return torch.linalg.qr(torch.randn(heads, dim, dim, dtype=torch.float64)).Q.float()

    entries = {
        i: LayerRotation(
            k_rotation=orthogonal(),
            v_rotation=orthogonal(),
            k_mean=torch.randn(heads, dim),
            k_clip=torch.full((heads,), 0.9),
            v_clip=torch.full((heads,), 0.9),
        )
        for i in range(layers)
    }
    metadata = RotationMetadata(
        model="model",
        fingerprint=fingerprint,
        model_type="llama",
        layer_ids=list(range(layers)),
        num_kv_heads=heads,
        num_query_heads=2 * heads,
        head_dim=dim,
        data="test",
        tokens=1,
        seed=0,
        versions={},
        recipe={},
        source="calibrate",
        sensitivity=[1.0] * layers,
    )
    return RotationSet(metadata, entries)


def configure(model, dtype="oscar-int2", settings=None, **arguments):
    """What `vllm serve` does before it starts a process: build the configuration."""
    from vllm.engine.arg_utils import EngineArgs

    if settings is not None:
        arguments["additional_config"] = {"kvcompress": settings}
    arguments = {"max_model_len": 512, "skip_tokenizer_init": True, **arguments}
    return EngineArgs(model=str(model), kv_cache_dtype=dtype, **arguments).create_engine_config()


def refused(model, *words, **arguments):
    # pydantic reports a ValueError raised inside a configuration as its own ValidationError, a ValueError too.
    with pytest.raises(ValueError) as caught:
        configure(model, **arguments)
    message = str(caught.value)
    for word in words:
        assert word in message, message


def test_a_fitting_file_is_accepted(model, tmp_path):
    path = tmp_path / "rotation.safetensors"
    rotations.write_rotation(path, rotation_set(rotations.model_fingerprint(model)))
    assert configure(model, settings={"rotation": str(path)}).cache_config.cache_dtype == "oscar-int2"


def test_order_of_search(model, tmp_path):
    """Explicit setting, then beside the model, then the user cache by fingerprint."""
    from vllm_kvcompress.checks import resolve

    own = tmp_path / "copy"
    shutil.copytree(model, own)
    found = rotation_set(rotations.model_fingerprint(own))
    cache = rotations.user_cache_path(rotations.model_fingerprint(own))
    rotations.write_rotation(cache, found)
    assert resolve(configure(own)).rotation == cache
    beside = own / rotations.ROTATION_BESIDE_MODEL
    rotations.write_rotation(beside, found)
    checks._resolve.cache_clear()
    assert resolve(configure(own)).rotation == beside
    explicit = tmp_path / "explicit.safetensors"
    rotations.write_rotation(explicit, found)
    assert resolve(configure(own, settings={"rotation": str(explicit)})).rotation == explicit


def test_missing_file(model):
    refused(model, "kvcompress calibrate")


def test_explicit_file_that_is_not_there(model, tmp_path):
    refused(model, "nowhere.safetensors", settings={"rotation": str(tmp_path / "nowhere.safetensors")})


@pytest.mark.parametrize(
    "spoil,word",
    [
        (lambda data: data[: len(data) // 2], "kvcompress calibrate"),
        (lambda data: b"", "kvcompress calibrate"),
        (lambda data: b"PK\x03\x04" + data, "kvcompress calibrate"),
        (lambda data: json.dumps({"a": 1}).encode(), "kvcompress calibrate"),
    ],
    ids=["truncated", "empty", "zip", "json"],
)
def test_corrupt_file(model, tmp_path, spoil, word):
    path = tmp_path / "rotation.safetensors"
    rotations.write_rotation(path, rotation_set(rotations.model_fingerprint(model)))
    path.write_bytes(spoil(path.read_bytes()))
    refused(model, word, str(path), settings={"rotation": str(path)})


def test_a_file_that_changes_after_the_check_is_refused_by_the_worker(model, tmp_path):
    """Damaged, taken away, or another model's by the time that the weights are loaded."""
    from vllm_kvcompress.attention import impl

    path = tmp_path / "rotation.safetensors"
    fingerprint = rotations.model_fingerprint(model)
    rotations.write_rotation(path, rotation_set(fingerprint))
    config = configure(model, settings={"rotation": str(path)})
    whole = path.read_bytes()
    for change, words in (
        (lambda: path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), "checksum does not match"),
        (path.unlink, "there is no rotation file"),
        (lambda: rotations.write_rotation(path, rotation_set("0" * 32)), "was calibrated on other weights"),
        (lambda: rotations.write_rotation(path, rotation_set(fingerprint, layers=1)), "no rotation for layer 1"),
    ):
        change()
        with pytest.raises(RotationError, match=words):
            impl._read_rotation(path, config)


def test_foreign_model(model, tmp_path):
    path = tmp_path / "rotation.safetensors"
    rotations.write_rotation(path, rotation_set("0" * 32))
    refused(model, "0" * 32, "kvcompress calibrate", settings={"rotation": str(path)})


@pytest.mark.parametrize("changes", [{"layers": 1}, {"heads": 1}, {"dim": 96}], ids=str)
def test_wrong_geometry(model, tmp_path, changes):
    path = tmp_path / "rotation.safetensors"
    rotations.write_rotation(path, rotation_set(rotations.model_fingerprint(model), **changes))
    refused(model, str(path), "kvcompress calibrate", settings={"rotation": str(path)})


def test_rotation_for_a_format_without_one(model, tmp_path):
    path = tmp_path / "rotation.safetensors"
    rotations.write_rotation(path, rotation_set(rotations.model_fingerprint(model)))
    refused(model, "uses no rotation file", dtype="hadamard-int2", settings={"rotation": str(path)})


@pytest.mark.parametrize(
    "settings,word",
    [({"sink_tokens": -5}, "sink_tokens=-5"), ({"recent": 3}, "recent=3"), ({"recent_tokens": 1 << 30}, "1073741824")],
)
def test_settings_out_of_range(model, settings, word):
    refused(model, word, dtype="hadamard-int2", settings=settings)


def test_head_size(tmp_path):
    refused(save_model(tmp_path / "m", head_dim=80), "80", "64, 96, 128, 256", dtype="hadamard-int2")


@pytest.mark.parametrize(
    "kind,word",
    [
        pytest.param(
            "use_mla", "(MLA)", marks=pytest.mark.feature("MLA", "refused", "its latents are compressed already")
        ),
        pytest.param(
            "is_hybrid", "state-space", marks=pytest.mark.feature("hybrids with state-space layers", "refused")
        ),
        pytest.param(
            "is_encoder_decoder", "encoder-decoder", marks=pytest.mark.feature("encoder-decoder models", "refused")
        ),
    ],
)
def test_kinds_of_models(model, monkeypatch, kind, word):
    """As vLLM tells them apart: to ask it about a real one takes a process that imports the model."""
    config = configure(model, dtype="hadamard-int2")
    monkeypatch.setattr(type(config.model_config), kind, property(lambda self: True))
    with pytest.raises(ValueError, match=word) as caught:
        checks.check_config(config)
    assert "--kv-cache-dtype auto" in str(caught.value)


@pytest.mark.feature("soft-capped attention logits", "refused")
def test_soft_cap(tmp_path):
    refused(save_model(tmp_path / "m", attn_logit_softcapping=30.0), "soft-capped", "auto", dtype="hadamard-int2")


@pytest.mark.feature("embedding and other pooling models", "refused", "they read each cache once")
def test_pooling(model):
    refused(model, "runner 'pooling'", "auto", dtype="hadamard-int2", runner="pooling", convert="embed")


@pytest.mark.feature("sleep mode", "refused", "remove --enable-sleep-mode")
def test_sleep_mode(model):
    """vLLM has none on the CPU, so the flag is set once that is past."""
    config = configure(model, dtype="hadamard-int2")
    config.model_config.enable_sleep_mode = True
    with pytest.raises(ValueError, match="--enable-sleep-mode"):
        checks.check_config(config)


@pytest.mark.parametrize(
    "arguments,word",
    [
        pytest.param(
            {"sinks": torch.zeros(4)},
            "sink",
            id="sinks",
            marks=pytest.mark.feature("attention sinks in the model", "refused"),
        ),
        pytest.param({"alibi_slopes": [0.5] * 4}, "ALiBi", id="ALiBi", marks=pytest.mark.feature("ALiBi", "refused")),
        pytest.param({"logits_soft_cap": 30.0}, "soft-capped", id="soft cap"),
        pytest.param({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, "sharing", id="sharing"),
    ],
)
def test_layers_of_models(model, arguments, word):
    """What no configuration tells: the layer is asked when the model is built."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = configure(model, dtype="hadamard-int2")
    with set_current_vllm_config(config), pytest.raises(checks.KVCompressError, match=word) as caught:
        layer = {"num_heads": 4, "head_size": DIM, "scale": 1.0, "num_kv_heads": HEADS}
        Attention(**layer, cache_config=config.cache_config, prefix="model.layers.1.self_attn.attn", **arguments)
    assert "--kv-cache-dtype auto" in str(caught.value)


@pytest.mark.parametrize("block_size", [16, 40, 64, 192])
def test_block_size(model, block_size):
    refused(model, "--block-size", f"got {block_size}", dtype="hadamard-int2", block_size=block_size)


def test_block_size_is_remembered(model):
    """vLLM's engine core overwrites it with the windows', and has the configuration from another process."""
    config = pickle.loads(pickle.dumps(configure(model, "hadamard-int2", block_size=256)))
    config.cache_config.block_size = 16
    assert checks.kernel_case(config).page_tokens == 256


@pytest.mark.feature("models with nothing but sliding windows", "refused", "no cache grows with the context")
def test_sliding_window(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=128,
        max_position_embeddings=512,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", "every layer has a sliding window", "auto", dtype="hadamard-int2")


def save_gemma(folder: Path, kinds: list[str]) -> Path:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        sliding_window=128,
        layer_types=kinds,
        max_position_embeddings=512,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_only_sliding_windows_among_the_kinds(tmp_path):
    refused(save_gemma(tmp_path / "m", [SLIDING] * 2), "every layer has a sliding window", dtype="hadamard-int2")


def test_sliding_windows_beside_full_attention(tmp_path, monkeypatch):
    """Kept in 16 bits, which the log says once; the rotation file needs the other layers only."""
    said = []
    monkeypatch.setattr(checks.logger, "info", lambda text, *values: said.append(text % values))
    model = save_gemma(tmp_path / "m", [SLIDING, FULL, SLIDING])
    config = configure(model, dtype="hadamard-int2")
    assert config.cache_config.kv_cache_dtype_skip_layers == ["sliding_window"]
    (line,) = [line for line in said if "sliding window" in line]
    assert line.startswith("2 of 3 layers have a sliding window (128 tokens) and keep their cache in bfloat16")
    checks.check_config(config)  # vLLM checks a configuration again where it is changed
    configure(model, dtype="hadamard-int2", kv_cache_dtype_skip_layers=["sliding_window"])
    refused(model, "--kv-cache-dtype-skip-layers", dtype="hadamard-int2", kv_cache_dtype_skip_layers=["0"])

    path = model / rotations.ROTATION_BESIDE_MODEL
    found = rotation_set(rotations.model_fingerprint(model), layers=2)
    layers = {1: found.layers[1]}
    metadata = found.metadata.model_copy(update={"layer_ids": [1], "sensitivity": [1.0]})
    rotations.write_rotation(path, RotationSet(metadata, layers))
    assert checks.resolve(configure(model)).rotation == path
    # Without the window all three layers grow with the context.
    refused(model, "no rotation for layer 0, 2", disable_sliding_window=True, max_model_len=128)


@pytest.mark.feature("chunked local attention", "refused")
def test_chunked_attention(tmp_path):
    path = save_gemma(tmp_path / "m", [SLIDING, FULL]) / "config.json"
    path.write_text(path.read_text().replace(SLIDING, "chunked_attention"))
    refused(path.parent, "chunked attention", dtype="hadamard-int2")


@pytest.mark.parametrize(
    "arguments,word",
    [
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        pytest.param(
            {"kv_cache_dtype_skip_layers": ["0"]},
            "--kv-cache-dtype-skip-layers",
            marks=pytest.mark.feature(
                "--kv-cache-dtype-skip-layers", "refused", "sliding-window layers are skipped unasked"
            ),
        ),
        ({"speculative_config": {**NGRAM, "num_speculative_tokens": 8}}, "at most 7"),
    ],
    ids=["hybrid manager", "skip layers", "many drafts"],
)
def test_flag_pairs(model, arguments, word):
    refused(model, word, dtype="hadamard-int2", **arguments)


EPISODIC = {"episodic": {"budget": 512, "block_tokens": 256}}
on_cpu = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="eviction runs on the CPU only so far")


@on_cpu
@pytest.mark.parametrize(
    "arguments,word",
    [
        ({"speculative_config": {**NGRAM, "num_speculative_tokens": 3}}, "speculative decoding"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"enable_lora": True}, "LoRA"),
    ],
)
def test_what_eviction_does_not_go_with(model, arguments, word):
    refused(model, word, "episodic", dtype="int2", settings=EPISODIC, **arguments)


@on_cpu
def test_eviction_from_caches_of_vllm(model):
    configure(model, "auto", settings=EPISODIC)
    refused(model, "not with fp8", "episodic", dtype="fp8", settings=EPISODIC)


@on_cpu
@pytest.mark.parametrize(
    "episodic,word",
    [({}, "budget"), ({"budget": 100}, "512"), ({"budget": 512, "policy": "lru"}, "epicache"), ("{", "episodic")],
)
def test_settings_of_eviction(model, episodic, word):
    refused(model, word, dtype="int2", settings={"episodic": episodic})


@on_cpu
def test_arguments_of_a_request(model):
    from vllm import SamplingParams

    plain, evicting = configure(model, "int2"), configure(model, "int2", EPISODIC)
    wanted = SamplingParams(extra_args={"kvcompress_budget": 512, "kvcompress_policy": "keydiff"})
    checks.check_request(evicting, wanted)
    checks.check_request(plain, SamplingParams(extra_args={"other": 1}))
    with pytest.raises(checks.KVCompressError, match="start it with"):
        checks.check_request(plain, wanted)
    with pytest.raises(checks.KVCompressError, match="kvcompress_budgte='x'"):
        checks.check_request(evicting, SamplingParams(extra_args={"kvcompress_budgte": "x"}))


@pytest.mark.feature("micro-batching (--enable-dbo)", "refused")
def test_micro_batching(model):
    config = configure(model, dtype="hadamard-int2")
    config.parallel_config.enable_dbo = True
    with pytest.raises(ValueError, match="--enable-dbo"):
        checks.check_config(config)


@pytest.mark.feature("context parallelism", "refused")
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_context_parallelism(model, kind):
    config = configure(model, dtype="hadamard-int2")
    setattr(config.parallel_config, f"{kind}_context_parallel_size", 2)
    with pytest.raises(ValueError, match="context-parallel sizes to 1"):
        checks.check_config(config)


@pytest.mark.feature(
    "drafts of a model (draft model, EAGLE, MTP)", "refused", "their layers have no rotations in the file"
)
def test_drafts_need_no_cache_of_their_own(model):
    """Drafts looked up in the prompt are served; those of a model, whose layers would need rotations, are refused."""
    drafts = {**NGRAM, "num_speculative_tokens": 7}
    config = configure(model, dtype="hadamard-int2", speculative_config=drafts)
    assert config.speculative_config.num_speculative_tokens == 7
    config.speculative_config.method = "draft_model"
    with pytest.raises(ValueError, match=r"'draft_model'.*--speculative-config"):
        checks.check_config(config)


@pytest.mark.parametrize(
    "kernels,word", [("cuda", "CUDA device"), ("triton", "CUDA device"), ("fast", "kernels='fast'")]
)
def test_kernels_that_cannot_run_here(model, monkeypatch, kernels, word):
    """On the CPU; tests/kernels/test_selection.py has the other devices."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(model, word, dtype="hadamard-int2", settings={"kernels": kernels})


def test_kernels_from_the_environment(model, monkeypatch):
    monkeypatch.setenv("VLLM_KVCOMPRESS_KERNELS", "torch")
    assert checks.kernel_path(configure(model, dtype="hadamard-int2")) == ("torch", "kernels=torch")


def test_unknown_dtype_is_still_refused_by_vllm(model):
    with pytest.raises(ValueError):
        configure(model, dtype="oscar-int3")


def test_other_dtypes_need_no_rotation(model):
    assert configure(model, dtype="auto").cache_config.cache_dtype in ("auto", "float32", "bfloat16")


@on_cpu
@pytest.mark.parametrize("tokens", [128, 2048])
def test_eviction_is_turned_on_by_its_settings(model, tokens):
    """A connector of ours, and no step longer than a block, whatever else is in it."""
    config = configure(model, "hadamard-int2", EPISODIC, max_num_batched_tokens=tokens, max_num_seqs=4)
    assert config.kv_transfer_config.kv_connector == "EvictionConnector"
    assert checks.evicts(config)
    assert config.scheduler_config.long_prefill_token_threshold == min(tokens, 256)
    assert checks.eviction_defaults(config).block_tokens == min(tokens, 256)
    plain = configure(model, "hadamard-int2")
    assert plain.kv_transfer_config is None and not checks.evicts(plain)


@on_cpu
@pytest.mark.feature("KV connectors and offloading", "refused", "eviction is one, and there can be one")
@pytest.mark.parametrize("settings", [None, EPISODIC])
def test_other_connectors_are_refused(model, settings):
    from vllm.config import KVTransferConfig

    other = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    refused(model, "remove --kv-transfer-config", dtype="hadamard-int2", settings=settings, kv_transfer_config=other)
    refused(model, "--kv-offloading-size", dtype="hadamard-int2", settings=settings, kv_offloading_size=1.0)


def by_sensitivity(**settings):
    return {"episodic": {**EPISODIC["episodic"], "layer_budgets": "sensitivity"}, **settings}


def write_profile(path, sensitivity, fingerprint=""):
    found = rotation_set(fingerprint, layers=len(sensitivity) or 2)
    metadata = found.metadata.model_copy(update={"sensitivity": sensitivity})
    rotations.write_rotation(path, rotations.RotationSet(metadata, found.layers))


@on_cpu
@pytest.mark.parametrize("dtype", ["oscar-int2", "hadamard-int2", "turboquant-2.5"])
def test_budgets_by_layer_come_from_the_rotation_file(model, tmp_path, dtype):
    """Of formats that need none otherwise, too; those do not rotate by it."""
    path = tmp_path / "rotation.safetensors"
    write_profile(path, [0.0, 0.5], rotations.model_fingerprint(model))
    resolved = checks.resolve(configure(model, dtype, by_sensitivity(rotation=str(path))))
    # Two layers, two classes: the lower at the floor of a quarter.
    assert dict(resolved.budget_shares) == pytest.approx({0: 0.25, 1: 1.75}, abs=1e-5)
    assert resolved.profile == path and resolved.rotation == (None if dtype == "hadamard-int2" else path)
    uniform = EPISODIC if dtype == "hadamard-int2" else {**EPISODIC, "rotation": str(path)}
    assert not checks.resolve(configure(model, dtype, uniform)).budget_shares


@on_cpu
def test_budgets_by_layer_without_a_profile(model, tmp_path):
    refused(model, "no rotation file", "kvcompress calibrate", dtype="hadamard-int2", settings=by_sensitivity())
    for number, (sensitivity, fingerprint, words) in enumerate(
        (
            ([], "", ("lacks", "kvcompress calibrate", '"uniform"')),
            ([0.1, 0.2], "f" * 32, ("calibrated on other weights",)),
            ([0.1] * 5, "", ("5 layers are no multiple of 3 or 2", '"uniform"')),
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        write_profile(path, sensitivity, fingerprint)
        refused(model, *words, dtype="hadamard-int2", settings=by_sensitivity(rotation=str(path)))


def test_sharpness_of_a_family():
    assert (recipes.alpha_for("Qwen/Qwen3-8B"), recipes.alpha_for("meta-llama/Llama-3.2-3B")) == (1.3, 1.1)


@on_cpu
def test_budgets_by_layer_need_pages_of_ours(model):
    """vLLM's own backends are not asked layer by layer."""
    settings = {"episodic": by_sensitivity()["episodic"]}
    refused(model, '"layer_budgets": "sensitivity" needs a --kv-cache-dtype', dtype="auto", settings=settings)
