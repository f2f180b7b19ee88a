# SPDX-License-Identifier: Apache-2.0
"""The folders triton_kernels/ and calibration/ are sub-packages of ours and never what `import triton_kernels` finds.

vLLM imports a package called `triton_kernels` (its MoE kernels). Each check runs in an interpreter of its own: with the
editable install, and with the source tree as current directory. test_wheel.py does the same for the wheel.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, cwd: Path, python: str = sys.executable, isolated: bool = False, **environ: str):
    """Run code; `-c` puts the current directory first on sys.path unless isolated."""
    import os

    flags = ["-I"] if isolated else []
    environ = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environ}
    done = subprocess.run([python, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, env=environ)
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.fixture
def real_package(tmp_path):
    """A stand-in for the real triton_kernels, as if in site-packages."""
    package = tmp_path / "site" / "triton_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .inner import WHO\n")
    (package / "inner.py").write_text("WHO = 'the real one'\n")
    return package.parent


SUBPACKAGES = """
import vllm_kvcompress.calibration, vllm_kvcompress.triton_kernels
print(vllm_kvcompress.calibration.__name__, vllm_kvcompress.triton_kernels.__name__)
"""
SPECS = """
import importlib.util
print([importlib.util.find_spec(name) for name in ("calibration", "triton_kernels")])
"""


def test_editable_install_has_the_subpackages_and_no_top_level_names(tmp_path):
    status, out, err = run(SUBPACKAGES, tmp_path)
    assert (status, out) == (0, "vllm_kvcompress.calibration vllm_kvcompress.triton_kernels"), err
    status, out, err = run(SPECS, tmp_path)
    assert (status, out) == (0, "[None, None]"), err


@pytest.mark.parametrize("where", ["elsewhere", "source tree"])
def test_the_real_package_is_found(where, real_package, tmp_path):
    code = """
import triton_kernels, triton_kernels.inner, importlib
print(triton_kernels.WHO, triton_kernels.__file__, importlib.import_module("triton_kernels") is triton_kernels)
import vllm_kvcompress.triton_kernels
"""
    cwd = ROOT if where == "source tree" else tmp_path
    status, out, err = run(code, cwd, PYTHONPATH=str(real_package))
    assert status == 0, err
    assert out == f"the real one {real_package / 'triton_kernels' / '__init__.py'} True"


def test_without_a_real_package_vllm_sees_none_in_the_source_tree():
    code = """
from vllm.utils.import_utils import _has_module
print(_has_module("triton_kernels"))
try:
    import triton_kernels.matmul_ogs
except ModuleNotFoundError as error:
    print(error.name)
"""
    status, out, err = run(code, ROOT)
    assert status == 0, err
    assert out.splitlines()[-2:] == ["False", "triton_kernels"]
