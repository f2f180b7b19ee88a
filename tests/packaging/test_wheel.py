# SPDX-License-Identifier: Apache-2.0
"""The wheel holds every package under our own name, entry points and licence, and works where it is installed."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = {"vllm_kvcompress": "vllm_kvcompress", "calibration": "vllm_kvcompress/calibration"}


@pytest.fixture(scope="module", params=["pure_wheel", "cuda_wheel"])
def wheel(request):
    return request.getfixturevalue(request.param)


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        declared = archive.read(entry_points).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_kvcompress"}
    assert not any(name.endswith((".cu", ".cuh", ".cpp", ".h")) for name in names)
    for folder, installed in SOURCES.items():
        modules = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        missing = {f"{installed}/{module.as_posix()}" for module in modules} - names
        assert not missing, f"not in the wheel (is the package listed in pyproject.toml?): {sorted(missing)}"
    assert "vllm_kvcompress/triton_kernels/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for group, points in (
        ("console_scripts", PROJECT["project"]["scripts"]),
        ("vllm.general_plugins", PROJECT["project"]["entry-points"]["vllm.general_plugins"]),
    ):
        assert f"[{group}]" in declared
        for name, target in points.items():
            assert f"{name} = {target}" in declared


def test_installed_in_a_bare_environment(wheel, tmp_path):
    """--no-deps, and this environment's packages behind it by a .pth file, minus the editable install."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    done = subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"""
import importlib.util, sys
print([importlib.util.find_spec(name) for name in ("calibration", "triton_kernels")])
sys.path.append({ours!r})  # .pth files in there are not run, so the editable install stays out
import vllm_kvcompress.calibration, vllm_kvcompress.triton_kernels
print(vllm_kvcompress.__file__)
from importlib.metadata import entry_points
print([point.value for point in entry_points(group="vllm.general_plugins", name="kvcompress")][:1])
"""
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    specs, file, points = done.stdout.splitlines()
    assert specs == "[None, None]"
    assert file.startswith(str(home))
    assert points == "['vllm_kvcompress.plugin:register']"
    assert (home / "bin" / "kvcompress").is_file()
