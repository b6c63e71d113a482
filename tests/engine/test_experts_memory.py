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


ROUND = {"pass": "rtn", "group_size": 32, "scale_search": "minmax"}
STEPS: dict[str, tuple[str, int, dict[str, object]]] = {  # family, number of experts, and a step
    "stored": ("qwen3_moe", 32, ROUND),
    "stored by their inputs": ("qwen3_moe", 128, {"pass": "gptq", "group_size": 32, "scale_search": "minmax"}),
    "dense in one tensor": ("gpt_oss", 32, {**ROUND, "only": ["@attention"]}),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
def test_no_process_holds_the_experts_of_a_block(tmp_path):
    """One process measures all kinds, since importing torch takes as long as a kind."""
    cases, experts = {}, {}
    for kind, (family, count, step) in STEPS.items():
        width = 2048 * 32 // count
        sizes = {"num_hidden_layers": 1, "hidden_size": 256, "num_local_experts": count, "num_experts": count}
        sizes["intermediate_size" if family == "gpt_oss" else "moe_intermediate_size"] = width
        tiny.save(family, tmp_path / kind / "m", dtype=torch.bfloat16, **sizes)
        experts[kind] = count * 3 * 256 * width * 2
        cases[kind] = [str(tmp_path / kind), step]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROBE), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == STEPS.keys()
    for kind, stages in found.items():
        assert stages.keys() == {"sweep", "verify", "evaluate"}
        assert max(stages.values()) < experts[kind] / 2, found
