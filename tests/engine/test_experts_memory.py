"""Experts that lie in a mapped file don't have to fit into memory, in any process of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

PROBE = Path(__file__).parents[1] / "support" / "experts_memory.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
def test_no_process_holds_the_experts_of_a_block(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "moe_intermediate_size": 2048, "num_experts": 32}
    model = tiny.save("qwen3_moe", tmp_path / "m", dtype=torch.bfloat16, **sizes)
    experts = 32 * 3 * 256 * 2048 * 2
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROBE), str(model), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"sweep", "verify", "evaluate"}
    assert max(found.values()) < experts / 2, found
