# SPDX-License-Identifier: Apache-2.0
"""Copies of the source tree and wheels built from them."""

import runpy
from pathlib import Path

import pytest

helpers = runpy.run_path(str(Path(__file__).with_name("cuda_wheel.py")))


@pytest.fixture
def source(tmp_path) -> Path:
    return helpers["copy_source"](tmp_path / "source")


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return helpers["build_wheel"](helpers["copy_source"](folder / "source"), folder, "0")


@pytest.fixture(scope="session")
def cuda_wheel() -> Path:
    return helpers["cuda_wheel"]()
