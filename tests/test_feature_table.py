# SPDX-License-Identifier: Apache-2.0
"""docs/features.md says what the tests say, of every feature there is to say something about."""

import pytest

from . import feature_table


@pytest.fixture(scope="module")
def found():
    return feature_table.collect(feature_table.ROOT / "tests")


def test_every_feature_has_a_test(found):
    assert set(found) == set(feature_table.FEATURES)


def test_the_page_is_current(found):
    current = feature_table.page(found)
    assert feature_table.PAGE.read_text(encoding="utf-8") == current, "run: python tests/feature_table.py"


SOURCE = """
import pytest
@pytest.mark.feature("a", "works", "slowly")
@pytest.mark.long
def test_a(): ...
@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.feature("b", "refused")), 2])
def test_b(x): ...
"""


def test_marks_are_read(tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "test_x.py").write_text(SOURCE)
    (tmp_path / "test_y.py").write_text(SOURCE.replace("@pytest.mark.long\n", ""))
    found = feature_table.collect(tmp_path)
    assert found["a"].row("a") == "| a | works; slowly | CPU, GPU | `gpu/test_x.py::test_a`*, `test_y.py::test_a` |\n"
    assert found["b"].tests == ["gpu/test_x.py::test_b", "test_y.py::test_b"]


@pytest.mark.parametrize("marks", ['("a", "perhaps")', '("a",)', '("a", state)', '("b", "works")'])
def test_marks_that_say_nothing_or_two_things(tmp_path, marks):
    (tmp_path / "test_x.py").write_text(SOURCE + f"@pytest.mark.feature{marks}\ndef test_c(): ...\n")
    with pytest.raises(ValueError, match=r"test_x\.py::test_c"):
        feature_table.collect(tmp_path)
