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
STEPS: dict[str, tuple[str, str, dict[str, object]]] = {  # family, the key of the experts' width, and a step
    "stored": ("qwen3_moe", "moe_intermediate_size", ROUND),
    "stored by their inputs": (
        "qwen3_moe",
        "moe_intermediate_size",
        {"pass": "gptq", "group_size": 32, "only": ["gate_proj", "up_proj"]},
    ),
    "dense in one tensor": ("gpt_oss", "intermediate_size", {**ROUND, "only": ["@attention"]}),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
@pytest.mark.parametrize("kind", STEPS)
def test_no_process_holds_the_experts_of_a_block(kind, tmp_path):
    family, width, step = STEPS[kind]
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, width: 2048, "num_local_experts": 32, "num_experts": 32}
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16, **sizes)
    experts = 32 * 3 * 256 * 2048 * 2
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROBE), str(model), str(tmp_path), json.dumps(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"sweep", "verify", "evaluate"}
    assert max(found.values()) < experts / 2, found
