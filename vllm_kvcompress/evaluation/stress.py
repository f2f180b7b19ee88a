# SPDX-License-Identifier: Apache-2.0
"""`--stress outliers=16`: a copy of the model that computes the same function with outliers in its key channels.

In each layer and KV head `PAIRS_PER_HEAD` RoPE pairs are drawn from the slower half of the head's pairs, where the
outliers of large models sit. Keys are multiplied by the factor in both channels of a pair, so that the rotation
commutes with it, and the queries of every head in the group divided by it: no score changes. Rows of the projections
(and their biases) carry the scale; where queries and keys are normalised after the projection, the norm's weights do,
and all heads of a layer share its pairs.

A power of two is exact in every float format: the copy then computes the very same numbers. Other factors round the
scaled weights once. Each run measures it: `auto` runs on both models, and the run ends where their outputs differ.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vllm_kvcompress.config import NAMESPACE, load_settings
from vllm_kvcompress.errors import KVCompressError, UnsupportedModelError
from vllm_kvcompress.evaluation.report import Row
from vllm_kvcompress.evaluation.specs import FormatSpec
from vllm_kvcompress.formats import get_format
from vllm_kvcompress.rotations.locate import ROTATION_BESIDE_MODEL, model_folder
from vllm_kvcompress.weight_files import SINGLE_FILE, read_index

PAIRS_PER_HEAD = 2
PLAIN_LABEL = "auto (plain model)"
# Noise of auto against auto in bf16 is below 1e-3 nat, the damage of a pair scaled apart many times this.
_MAX_KL = 0.01

_TENSOR = re.compile(r"model\.layers\.(\d+)\.self_attn\.(.+)")
_PROJECTIONS = {
    f"{projection}.{kind}"
    for projection in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "dense")
    for kind in ("weight", "bias")
} | {"rotary_emb.inv_freq"}
_NORMS = {"q_norm.weight", "k_norm.weight"}
# Norms of a whole head, before RoPE, whose weight is the factor itself (Gemma's is one less, so 16 would round).
_NORM_MODELS = ("qwen3", "qwen3_moe")
_FLOATS = ("F16", "BF16", "F32", "F64")
_NOT_LINKED = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def parse_stress(text: str) -> float:
    """The factor of `outliers=FACTOR`.

    Raises:
        KVCompressError: another name, or no finite number of at least 1.
    """
    name, equals, value = text.partition("=")
    if name != "outliers":
        raise KVCompressError(f"--stress {text}: unknown stress {name!r}; known: outliers=FACTOR")
    try:
        factor = float(value)
    except ValueError:
        factor = math.nan
    if not equals or not 1 <= factor < math.inf:
        raise KVCompressError(f"--stress {text}: the factor must be a number of at least 1, as in outliers=16")
    return factor


def stressed_specs(specs: Sequence[FormatSpec], model: str, rotation: str | None = None) -> list[FormatSpec]:
    """The reference on the plain model, then all of `specs` (the reference first) on the stressed one.

    Windows are named: the recipe of a model goes by its name, which the copy does not bear.

    Args:
        rotation: of the command line, to be refused whether or not a format uses it.

    Raises:
        KVCompressError: a rotation file is given; it was made for the plain model.
    """
    found = [replace(specs[0], label=PLAIN_LABEL)]
    for spec in specs:
        given = rotation or (load_settings(spec.additional_config).rotation if spec.ours else None)
        if given is not None:
            raise KVCompressError(
                f"--stress does not go with the rotation file {given}: it belongs to the plain model. Leave it out: "
                "one is made for the stressed model"
            )
        if spec.ours:
            sinks, recent = spec.windows(model)
            own = spec.additional_config.get(NAMESPACE, {}) | {"sink_tokens": sinks, "recent_tokens": recent}
            spec = replace(spec, additional_config={**spec.additional_config, NAMESPACE: own})
        found.append(spec)
    return found


def needs_calibration(specs: Sequence[FormatSpec]) -> bool:
    """Whether any format needs a rotation file."""
    return any(spec.ours and get_format(spec.kv_cache_dtype).needs_calibration for spec in specs)


def calibrate(folder: Path, text: str) -> None:
    """Make the rotation file of a stressed copy, beside it, where its engines look.

    `kvcompress calibrate` in a process of its own, whose memory is free before the engines start.

    Raises:
        KVCompressError: it failed; the reason is on screen.
    """
    data = folder.parent / "calibration.txt"
    data.write_text(text, encoding="utf-8")
    out = folder / ROTATION_BESIDE_MODEL
    command = ["calibrate", str(folder), "--data", str(data), "--out", str(out)]
    # It prints how to serve the model, which is gone after this run.
    done = subprocess.run([sys.executable, "-m", "vllm_kvcompress", *command], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise KVCompressError(f"calibration of the stressed model failed with status {done.returncode}, see above")


def check_preserved(plain: Sequence[Row], stressed: Sequence[Row]) -> str:
    """A sentence on `auto` on the stressed model against the plain one, a row a context each.

    Raises:
        KVCompressError: they differ, so the transform does not fit this model, or the stressed one did not run.
    """
    parts = []
    for before, after in zip(plain, stressed, strict=True):
        if before.text is None or after.text is None:
            raise KVCompressError(f"auto failed on the stressed model: {after.error}")
        kl = after.text.kl.value
        figures = (
            f"perplexity {after.text.perplexity.value:.4f} against {before.text.perplexity.value:.4f}, KL {kl:.1e}"
        )
        if not kl <= _MAX_KL:  # NaN, too
            raise KVCompressError(
                f"the stressed model computes another function than the plain one at context {after.context} "
                f"({figures} nat): --stress does not fit this model"
            )
        parts.append(f"{figures} at context {after.context}")
    return f"auto on the stressed model computes what it does on the plain one: {'; '.join(parts)}."


@dataclass(frozen=True)
class Stress:
    """What is to be scaled, found out from the configuration and the headers of the weight files."""

    folder: Path
    """Of the plain model."""
    factor: float
    files: dict[Path, bool]
    """Weight files, and whether any of their tensors is scaled."""
    gains: dict[str, torch.Tensor]
    """By tensor name: [rows] float64, the factor of each row."""

    def __str__(self) -> str:
        return f"outliers={self.factor:g}"

    def write(self, target: Path) -> None:
        """Write the copy into a new folder. Files without a scaled tensor are links to the plain model's.

        Sub-folders are left out, the one with the plain model's rotation file among them, and so are spare weights,
        which an engine might prefer.

        Raises:
            KVCompressError: not enough space, or the factor takes a weight out of its dtype's range.
        """
        target.mkdir(parents=True)
        needed = sum(path.stat().st_size for path, scaled in self.files.items() if scaled)
        free = shutil.disk_usage(target).free
        if needed > free:
            raise KVCompressError(
                f"--stress writes {needed / 2**30:.1f} GiB of weights, but {target.parent} has {free / 2**30:.1f} GiB "
                "free; set TMPDIR to a larger disk"
            )
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix not in _NOT_LINKED:
                (target / path.name).symlink_to(path.resolve())
        for path, scaled in tqdm(self.files.items(), desc=f"stress {self}", unit="file", file=sys.stderr):
            if scaled:
                self._write_file(path, target / path.name)
            else:
                (target / path.name).symlink_to(path.resolve())

    def _write_file(self, path: Path, target: Path) -> None:
        tensors = {}
        with safe_open(path, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118 (not a dict)
                tensor = source.get_tensor(name)
                if name in self.gains:
                    gain = self.gains[name].view(-1, *[1] * (tensor.ndim - 1))
                    tensor = (tensor * gain).to(tensor.dtype)
                    if not torch.isfinite(tensor).all():
                        raise KVCompressError(f"--stress {self} takes {name} out of the range of {tensor.dtype}")
                tensors[name] = tensor
            metadata = source.metadata() or {}
        # A model's fingerprint samples few bytes of the tensors, but reads the header: the copy has its own.
        save_file(tensors, target, metadata={"format": "pt", **metadata, "kvcompress_stress": str(self)})


def plan_stress(model: str, factor: float, *, seed: int, config: Any) -> Stress:
    """Choose the channels, or refuse, without reading weights.

    Args:
        config: the model's whole configuration.

    Raises:
        UnsupportedModelError: a model whose scores the scaling would change, or that this cannot see through.
        KVCompressError: no safetensors weights on this machine.
    """
    _check_config(config, model)
    pairs = rope_pairs(config, model)
    files = _weight_files(model)
    shapes: dict[str, tuple[int, ...]] = {}
    holders: dict[str, Path] = {}
    for path in files:
        for name, dtype, shape in _header(path):
            match = _TENSOR.fullmatch(name)
            if match and dtype not in _FLOATS:
                raise UnsupportedModelError(f"--stress: {name} of {model} is quantised ({dtype}); use its original")
            shapes[name] = shape
            holders[name] = path
    gains = _gains(shapes, pairs, config, model, factor, seed)
    scaled = {holders[name] for name in gains}
    return Stress(files[0].parent, factor, {path: path in scaled for path in files}, gains)


def rope_pairs(config: Any, model: str) -> torch.Tensor:
    """Channels that RoPE turns into each other, as the model's own code does: [P, 2] int64, fastest pair first.

    Channels outside the rotary part are in no pair.

    Raises:
        UnsupportedModelError: no RoPE, or none of a known form.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise UnsupportedModelError(f"--stress: {model} ({config.model_type}) has no RoPE, whose pairs it scales")
    try:
        rotary = int(_head_dim(config) * (parameters.get("partial_rotary_factor") or 1.0))
        module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
        # A quarter turn of each single channel lands on its partner alone. [batch, heads, positions, channels]
        single = torch.eye(rotary)[None, None]
        sine = torch.ones(1, rotary, rotary)
        turned = module.apply_rotary_pos_emb(single, single, torch.zeros_like(sine), sine)[1][0, 0]
        partner = turned.abs().argmax(-1)
        channels = torch.arange(rotary)
        known = (
            not any(isinstance(value, dict) for value in parameters.values())  # one RoPE for all layers
            and bool((turned.abs().sum(-1) == 1).all())
            and bool(((partner[partner] == channels) & (partner != channels)).all())
        )
    except (KeyError, AttributeError, RuntimeError, TypeError, IndexError):
        known = False
    if not known:
        raise UnsupportedModelError(f"--stress: the RoPE of {model} ({config.model_type}) is of no form known here")
    first = channels[channels < partner]
    return torch.stack([first, partner[first]], dim=1)


def _check_config(config: Any, model: str) -> None:
    quantised = getattr(config, "quantization_config", None) is not None
    reasons = [
        (config.is_encoder_decoder, "is an encoder-decoder model"),
        (config.get_text_config() is not config, "is not a text-only model"),
        (bool(getattr(config, "kv_lora_rank", None)), "uses multi-head latent attention (MLA), which has no key heads"),
        (quantised, "is quantised, so its rows cannot be scaled; use the original checkpoint"),
        (bool(getattr(config, "clip_qkv", None)), "clips its keys, which would cut the outliers off"),
        (not isinstance(getattr(config, "num_attention_heads", None), int), "has no attention heads"),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise UnsupportedModelError(f"--stress: {model} ({config.model_type}) {reason}")


def _gains(
    shapes: dict[str, tuple[int, ...]], pairs: torch.Tensor, config: Any, model: str, factor: float, seed: int
) -> dict[str, torch.Tensor]:
    heads, head_dim = config.num_attention_heads, _head_dim(config)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers: dict[int, set[str]] = {}
    for name in shapes:
        if match := _TENSOR.fullmatch(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    if sorted(layers) != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"--stress: {model} ({config.model_type}) has model.layers.N.self_attn in {len(layers)} of its "
            f"{config.num_hidden_layers} layers; it is needed in all"
        )
    gains = {}
    for layer, parts in layers.items():
        norms = _NORMS if parts >= _NORMS and config.model_type in _NORM_MODELS else set()
        if unknown := sorted(parts - _PROJECTIONS - norms):
            raise UnsupportedModelError(
                f"--stress: attention of {model} ({config.model_type}) has {', '.join(unknown)}, which may undo or "
                "disturb the scaling"
            )
        fused = "qkv_proj.weight" in parts
        if not fused and not {"q_proj.weight", "k_proj.weight"} <= parts:
            raise UnsupportedModelError(
                f"--stress: layer {layer} of {model} has neither q_proj and k_proj nor qkv_proj, but "
                f"{', '.join(sorted(parts))}"
            )
        key = torch.ones(kv_heads, head_dim, dtype=torch.float64)
        for head in range(kv_heads):
            # Where all heads share the weights of a norm, the first one chooses.
            key[head, _choose(pairs, seed, layer, 0 if norms else head).flatten()] = factor
        query = 1 / key.repeat_interleave(heads // kv_heads, dim=0)
        if norms:
            own = {"q_norm": query[0], "k_norm": key[0]}
        elif fused:
            own = {"qkv_proj": torch.cat([query.flatten(), key.flatten(), torch.ones(key.numel())])}
        else:
            own = {"q_proj": query.flatten(), "k_proj": key.flatten()}
        for part, gain in own.items():
            for kind in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.{part}.{kind}"
                if name not in shapes:
                    continue
                if shapes[name][0] != len(gain):
                    raise UnsupportedModelError(
                        f"--stress: {name} of {model} has {shapes[name][0]} rows; {heads} query heads on {kv_heads} KV "
                        f"heads of size {head_dim} give {len(gain)}"
                    )
                gains[name] = gain
    return gains


def _choose(pairs: torch.Tensor, seed: int, layer: int, head: int) -> torch.Tensor:
    """Pairs of one head: [n, 2], drawn from the slower half."""
    slow = pairs[len(pairs) // 2 :]
    drawn = np.random.default_rng([seed, layer, head]).choice(len(slow), min(PAIRS_PER_HEAD, len(slow)), replace=False)
    return slow[torch.from_numpy(drawn)]


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _weight_files(model: str) -> list[Path]:
    """The safetensors files of a model on this machine: those the index names, or the single one."""
    folder = model_folder(model) if not Path(model).is_file() else None
    found: list[Path] = []
    if folder is not None:
        index = read_index(folder)
        found = [folder / SINGLE_FILE] if index is None else index.files
    missing = [path.name for path in found if not path.is_file()]
    if missing or not found:
        raise KVCompressError(
            f"--stress needs the safetensors weights of {model} on this machine"
            + (f"; {', '.join(missing)} is missing" if missing else "")
            + f". A model of the hub is fetched with: hf download {model}"
        )
    return found


def _header(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of a file."""
    with safe_open(path, framework="pt") as tensors:
        slices = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118 (not a dict)
        return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
