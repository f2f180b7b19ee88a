# SPDX-License-Identifier: Apache-2.0
"""A few random conversations at once over HTTP, against the same questions alone, and a minute of mixed load."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SOAK = Path(__file__).parents[2] / "benchmarks" / "episodic_soak.py"


def soak(demo_model, out, *arguments):
    """The report of a run that found nothing wrong."""
    seed = secrets.randbits(32)
    command = [sys.executable, str(SOAK), *arguments, "--concurrency", "4", "--seed", str(seed)]
    command += ["--random-weights", "--model", str(demo_model), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(out.read_text())


def test_conversations_at_once_are_answered_as_if_alone(demo_model, tmp_path):
    report = soak(demo_model, tmp_path / "report.json", "--conversations", "8")
    assert min(report["kinds"].values()) >= 1 and report["evicted"] >= 4 and report["compared"] >= 8


def test_mixed_load(demo_model, tmp_path):
    report = soak(demo_model, tmp_path / "report.json", "--minutes", "0.7")
    assert len(report["looks"]) >= 2 and sum(report["asked"].values()) >= 4
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
