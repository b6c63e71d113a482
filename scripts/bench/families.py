"""Shows on which model families the commands work, by tiny random models of each.

A model of each family is built from a config, saved as a checkpoint, and compressed by a few recipes, in a process of
its own with a time limit. Of an artifact with quantized weights, everything is compared bit for bit with what it should
be: each quantized weight with an unpacking in numpy that shares no code with the package, each other tensor of the
source with its bytes, and the outputs of the artifact, as transformers loads it, with those of the source in which each
weight has the value of its codes.

Figures of families that are not named stay in --output, so a few families can be measured again.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts" / "bench"), str(ROOT / "tests" / "support")]

import family_page  # noqa: E402
import result_file  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from family_models import FAMILIES, Family, Kind  # noqa: E402

from compressor.process.child import fork_from_here  # noqa: E402
from compressor.process.fork_server import IMPORTS  # noqa: E402

Result = dict[str, Any]
Recipes = dict[str, list[dict[str, Any]]]

LIMIT_SECONDS = 300.0
QUANTIZE = {"pass": "gptq", "bits": 4, "group_size": 32}
SLICE = [{"pass": "fuse_norms"}, {"pass": "slicegpt", "sparsity": 0.25, "orientation": "auto"}]
PRUNE = [{"pass": "vtrans", "target": 0.3, "steps": 2, "samples": 2}]
RECIPES: dict[Kind, Recipes] = {
    "decoder": {
        "gptq": [QUANTIZE],
        "slicegpt": SLICE,
        "prefill-pruning": [{"pass": "prefill_pruning", "min_prompt": 8, "keep": {0: 0.7}}],
    },
    "classifier": {"gptq": [QUANTIZE], "slicegpt": SLICE},
    "encoder": {"gptq": [QUANTIZE], "vtrans": PRUNE, "zero-tprune": [{"pass": "zero_tprune", "keep": {0: 0.7}}]},
    "vision": {"gptq": [QUANTIZE], "vtrans": PRUNE, "zero-tprune": [{"pass": "zero_tprune", "keep": {0: 0.7}}]},
    "wrapper": {"gptq": [QUANTIZE], "slicegpt": SLICE},
    "encoder-decoder": {"gptq": [QUANTIZE]},
}


def work(family: Family, folder: Path, results: Path, recipes: Recipes) -> None:
    """The process of one family. Appends a line to `results` for each recipe."""
    os.setsid()
    fork_from_here()
    from family_check import examine  # it imports the package, which a process that verifies does anew

    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    torch.set_num_threads(1)
    for name, result in examine(family, folder, recipes):
        with results.open("a") as file:
            file.write(json.dumps([name, result]) + "\n")


def measure(family: Family, limit: float, recipes: Recipes) -> dict[str, Result]:
    """Results of one family by recipe. A recipe whose process is killed or takes too long has that as its outcome."""
    with tempfile.TemporaryDirectory(prefix="families-") as scratch:
        folder, results = Path(scratch), Path(scratch) / "results.jsonl"
        results.touch()
        given = (family, folder, results, recipes)
        child = multiprocessing.get_context("fork").Process(target=work, args=given, daemon=True)
        child.start()
        child.join(limit)
        code = child.exitcode
        if code is None:
            assert child.pid is not None
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
        found = dict(json.loads(line) for line in results.read_text().splitlines())
    left = [name for name in recipes if name not in found and "build" not in found]
    if left:
        why = f"took more than {limit:g} s" if code is None else f"its process ended with {code}"
        found[left[0]] = {"outcome": "timed out" if code is None else "crashed", "message": why}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="measure these; left out: all")
    parser.add_argument("--list", action="store_true", help="print the names of the families and end")
    parser.add_argument("--recipe", action="append", help="run this recipe alone, or several of them: gptq")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="time of one family")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the page of --output; measure only FAMILY")
    result_file.add_output(parser, "families")
    settings = parser.parse_args(arguments)
    if settings.list:
        print("\n".join(FAMILIES))
        return 0
    if unknown := set(settings.families) - FAMILIES.keys():
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in IMPORTS:  # so that they are not imported once for each family
        importlib.import_module(module)
    report = json.loads(settings.output.read_text()) if settings.output.exists() else {"rows": {}}
    for name in settings.families or ([] if settings.docs else FAMILIES):
        family = FAMILIES[name]
        asked = {key: steps for key, steps in RECIPES[family.kind].items() if key in (settings.recipe or [key])}
        found = measure(family, settings.limit, asked)
        earlier = report["rows"].get(name, {}).get("recipes", {}) if settings.recipe else {}
        before = {key: result for key, result in earlier.items() if key != "build"}
        report["rows"][name] = {"class": family.cls, "kind": family.kind, "recipes": before | found}
        report |= {"transformers": transformers.__version__, "torch": torch.__version__}
        print(name, ", ".join(f"{key}: {result['outcome']}" for key, result in found.items()), flush=True)
        result_file.write(report, settings.output)
    if settings.docs:
        settings.docs.write_text(family_page.page(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
