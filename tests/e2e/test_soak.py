# SPDX-License-Identifier: Apache-2.0
"""A few random conversations at once over HTTP, against the same questions alone: a small `episodic_soak.py`."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SOAK = Path(__file__).parents[2] / "benchmarks" / "episodic_soak.py"


def test_conversations_at_once_are_answered_as_if_alone(demo_model, tmp_path):
    seed = secrets.randbits(32)
    command = [sys.executable, str(SOAK), "--conversations", "8", "--concurrency", "4", "--seed", str(seed)]
    command += ["--random-weights", "--model", str(demo_model), "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "report.json").read_text())
    assert min(report["kinds"].values()) >= 1 and report["evicted"] >= 4 and report["compared"] >= 8
