# SPDX-License-Identifier: Apache-2.0
"""Which formats to run, with which settings: `--formats auto,oscar-int2:recent_tokens=256,sink_tokens=64`."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any, get_args

from vllm_kvcompress.config import NAMESPACE, load_settings
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.formats import format_names, get_format, is_ours

REFERENCE = "auto"


@dataclass(frozen=True)
class FormatSpec:
    """One row of the table: a KV cache dtype and the settings it runs with."""

    label: str
    """As typed, e.g. `oscar-int2:recent_tokens=256`; unique within a run."""
    kv_cache_dtype: str
    additional_config: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return is_ours(self.kv_cache_dtype)

    def windows(self, model: str) -> tuple[int, int]:
        """(sink_tokens, recent_tokens) this row keeps exact; (0, 0) for a format without windows."""
        return load_settings(self.additional_config).windows(model) if self.ours else (0, 0)


def parse_formats(
    text: str, common: dict[str, Any] | None = None, additional_config: dict[str, Any] | None = None
) -> list[FormatSpec]:
    """Rows from the command line, the reference first whether or not it was named.

    Args:
        text: comma-separated names; `name:key=value,key=value` overrides settings of one row.
        common: plugin settings of every row of ours (a row's own overrides win).
        additional_config: base of every row's --additional-config.

    Raises:
        KVCompressError: unknown or repeated format, malformed override, override of a foreign format.
    """
    specs: list[FormatSpec] = []
    for name, overrides in _split(text):
        _check_known(name)
        if overrides and not is_ours(name):
            raise KVCompressError(
                f"--formats {name}: only this package's formats take settings ({', '.join(format_names())})"
            )
        config = copy.deepcopy(additional_config or {})
        if is_ours(name):
            settings = {**config.get(NAMESPACE, {}), **(common or {})}
            page_format = get_format(name)
            if not (page_format.needs_calibration or page_format.splits_channels):
                # One --rotation serves a whole comparison; formats that read no file refuse one.
                settings.pop("rotation", None)
            settings |= overrides
            if settings:
                config[NAMESPACE] = settings
        else:
            # Without one of our formats the plugin stays out of the way; so must its settings.
            config.pop(NAMESPACE, None)
        pairs = ",".join(f"{key}={_show(value)}" for key, value in overrides.items())
        specs.append(FormatSpec(f"{name}:{pairs}" if pairs else name, name, config))
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise KVCompressError(f"--formats names {label} more than once")
    base = copy.deepcopy(additional_config or {})
    base.pop(NAMESPACE, None)
    reference = FormatSpec(REFERENCE, REFERENCE, base)
    return [reference, *(spec for spec in specs if spec.label != REFERENCE)]


def _split(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`a,b:x=1,y=2,c` -> [(a, {}), (b, {x: 1, y: 2}), (c, {})]: a piece with `=` belongs to the format before it."""
    found: list[tuple[str, dict[str, Any]]] = []
    for piece in (piece.strip() for piece in text.split(",")):
        name, colon, first = piece.partition(":")
        if "=" in name:
            if colon:
                raise KVCompressError(f"--formats: cannot read {piece!r}; write NAME:KEY=VALUE,KEY=VALUE")
            if not found:
                raise KVCompressError(f"--formats: {piece!r} comes before any format; write NAME:{piece}")
            _add(found[-1][1], piece, found[-1][0])
            continue
        if not name:
            raise KVCompressError(f"--formats {text!r} has an empty name; write NAME,NAME:KEY=VALUE")
        found.append((name, {}))
        if colon:
            _add(found[-1][1], first, name)
    return found


def _add(overrides: dict[str, Any], pair: str, name: str) -> None:
    key, equals, value = pair.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise KVCompressError(f"--formats {name}: cannot read {pair!r}; write KEY=VALUE")
    try:
        overrides[key.strip()] = json.loads(value)
    except json.JSONDecodeError:
        overrides[key.strip()] = value.strip()


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_known(name: str) -> None:
    if name == REFERENCE or is_ours(name):
        return
    # vLLM takes seconds to import, so only a name that is not ours asks it.
    from vllm.config.cache import CacheDType

    known = [dtype for dtype in get_args(CacheDType) if dtype != REFERENCE and not is_ours(dtype)]
    if name not in known:
        raise KVCompressError(
            f"--formats: unknown format {name!r}; this package has {', '.join(format_names())}, "
            f"vLLM has {REFERENCE}, {', '.join(known)}"
        )
