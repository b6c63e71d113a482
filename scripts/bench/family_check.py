"""Runs the recipes of families.py on one model family, and compares an artifact with what it should be.

families.py forks a process that imports this. The comparison shares no code with the package: it reads manifest and
tensors by docs/format.md.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
import yaml
from family_models import Family, build, save
from safetensors import safe_open
from torch import Tensor

from compressor.cli.main import main as compress_model
from compressor.errors import CompressError
from compressor.model.probe_model import example_batch, use_eager_experts

LENGTH, SAMPLES = 32, 8
IMAGES = 16
OTHER_PIXELS = (3, 32, 32)  # of images for a model whose inputs are not known
ERROR_TOLERANCE = 1e-3  # of an error that the run has recorded, for sums in another order
OPTIONS = ["--json", "--no-eval", "--device", "cpu", "--threads", "1"]

Result = dict[str, Any]


def examine(family: Family, folder: Path, recipes: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, Result]]:
    """Give the results of a family by recipe, or one result `build` if there is no model."""
    try:
        model = build(family)
        inputs = known_inputs(model)
        if inputs is not None:
            check_runs(model, inputs)
        save(family, model, folder / "source")
    except Exception as error:  # any: rules of sizes are the class's own
        yield "build", {"outcome": "not built", "message": f"{type(error).__name__}: {error}"[:400]}
        return
    data: dict[str, Any] = {"source": "random", "samples": SAMPLES, "length": LENGTH}
    if model.main_input_name == "pixel_values":
        size = OTHER_PIXELS if inputs is None else inputs["pixel_values"].shape[1:]
        data = {"source": str(write_images(folder, *size)), "samples": SAMPLES}
    for name, steps in recipes.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"version": 1, "name": name, "data": data, "steps": steps}))
        began = time.perf_counter()
        result = compress(recipe, folder / "source", folder / name)
        if result["outcome"] == "works" and name == "gptq":
            result |= compare(folder / "source", folder / name)
        yield name, {**result, "seconds": round(time.perf_counter() - began, 1)}


def known_inputs(model: transformers.PreTrainedModel) -> dict[str, Tensor] | None:
    """Inputs of the model, or None for a model that reads others, which `plan` refuses."""
    if model.config.is_encoder_decoder:
        return None
    try:
        return example_batch(model, torch.device("cpu"))
    except CompressError:
        return None


@torch.no_grad()
def check_runs(model: transformers.PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Run the model. raises what it raises; ValueError for outputs that aren't finite"""
    if not bool(torch.isfinite(model(**inputs)[0]).all()):
        raise ValueError("outputs are not finite")


def write_images(folder: Path, channels: int, height: int, width: int) -> Path:
    """Random images as a data file."""
    pixels = numpy.random.default_rng(0).integers(0, 255, (IMAGES, height, width, channels), dtype=numpy.uint8)
    numpy.savez(folder / "images.npz", images=pixels, labels=numpy.arange(IMAGES) % 3)
    return folder / "images.npz"


def compress(recipe: Path, source: Path, output: Path) -> Result:
    """Run a recipe without evaluation. The result has the outcome and the error, if there was one."""
    places = ["--model", str(source), "--output", str(output)]
    code, events, errors = tell(["run", str(recipe), *places, *OPTIONS])
    if code == 0:
        report = next(event for event in events if event["event"] == "result")["report"]
        return {
            "outcome": "works",
            "export_format": report["route"]["name"],
            "warnings": dict(Counter(warning["code"] for warning in report["warnings"])),
        }
    stages = [event.get("name", "sweep") for event in events if event["event"] in ("stage", "sweep")]
    stage = stages[-1] if stages else "recipe"
    error = next((event for event in events if event["event"] == "error"), {})
    found = {"stage": stage, "code": code, **{key: error.get(key) for key in ("where", "message", "hint", "data")}}
    if code == 1:
        return {"outcome": "crashed", **found, "traceback": errors[-4000:]}
    return {"outcome": "refused" if stage == "plan" else "failed", **found}


def tell(arguments: list[str]) -> tuple[int, list[dict[str, Any]], str]:
    """Run a command in this process. Returns its exit code, the events that it printed, and its standard error."""
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as errors:
        code = compress_model(arguments)
    return code, [json.loads(line) for line in printed.getvalue().splitlines()], errors.getvalue()


def compare(source: Path, artifact: Path) -> Result:
    """Compare an artifact with what it should be. Adds to a result: the outcome, counts, and sentences on differences.

    raises nothing: an error of transformers on the artifact is a difference
    """
    manifest = json.loads((artifact / "compress_manifest.json").read_text())
    report = json.loads((artifact / "report.json").read_text())
    before, after = read_tensors(source), read_tensors(artifact)
    weights = manifest["weights"]
    values = {name: unpacked(entry, after) for name, entry in weights.items()}
    taken = {entry["tensor"] for entry in weights.values()}
    accounts = [account for account in report["ledger"]["accounts"] if account["becomes"] == "left out"]
    said = {name: account["how"] for account in accounts for name in account["tensors"]}
    missing = [name for name in before if name not in taken and name not in after]
    lost = [name for name in missing if name not in said]
    differs = [
        f"{name} is {described(after[name])} in the artifact, {described(before[name])} in the source"
        for name in sorted(before.keys() & after.keys() - taken)
        if not equal(before[name], after[name])
    ]
    recorded = manifest["source"]["relative_errors"]
    errors = {name: relative_error(values[name], entry, before) for name, entry in weights.items()}
    differs += [
        f"{name} has a relative error of {error:.4g} against the source, {recorded[name]} is recorded"
        for name, error in errors.items()
        if recorded[name] is None or not abs(error - recorded[name]) <= ERROR_TOLERANCE * error
    ]
    try:
        differs += loaded_differences(source, artifact, manifest, values)
    except Exception as error:  # any: what plain transformers makes of the artifact is the result
        differs.append(f"transformers fails on the artifact: {type(error).__name__}: {error}"[:600])
    matrices = sum(value.numel() for value in before.values() if value.dim() > 1)
    return {
        "outcome": "differs" if differs else "lost tensors" if lost else "exact",
        "quantized_weights": len(weights),
        "largest_error": max(errors.values(), default=0.0),
        "quantized_share": sum(value.numel() for value in values.values()) / matrices,
        "left_out": {name: said[name] for name in missing if name in said},
        "lost": lost,
        "differs": differs,
    }


def read_tensors(directory: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (no dict)
    return found


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and bits are equal."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))


def described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def unpacked(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The values (out, in) of a stored weight, in the dtype of its scales, by docs/format.md alone."""
    assert entry["form"] == "packed_linear", entry["form"]
    format_params, (rows, columns) = entry["spec"], entry["shape"]
    parts = {name: tensors[f"{entry['name']}.weight_{name}"] for name in ("packed", "scale")}
    codes = signed(parts["packed"], format_params["bits"], columns)
    scale = parts["scale"].repeat_interleave(columns // parts["scale"].shape[1], 1)
    if not format_params["symmetric"]:
        packed = tensors[f"{entry['name']}.weight_zero_point"].t().contiguous()
        zeros = signed(packed, format_params["bits"], rows).t()
        codes = codes - zeros.repeat_interleave(columns // zeros.shape[1], 1)
    return codes.to(scale.dtype) * scale


def relative_error(value: Tensor, entry: dict[str, Any], source: dict[str, Tensor]) -> float:
    """Frobenius norm of the difference from the source's weight, divided by that of the weight."""
    meant = source[entry["tensor"]].float()
    if meant.dim() == 3:  # of all experts
        meant = meant[entry["expert"]]
    meant = meant.t() if entry["transposed"] else meant
    if meant.shape != value.shape:  # several weights of one expert
        meant = meant[entry["rows"][0] : entry["rows"][1]]
    return float((value.float() - meant).norm() / meant.norm())


def signed(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes of rows of little-endian bit streams in int32 words, minus half of their range."""
    stream = numpy.unpackbits(packed.numpy().astype("<i4").view(numpy.uint8), axis=1, bitorder="little")
    digits = stream[:, : count * bits].reshape(len(stream), count, bits).astype(numpy.int64)
    return torch.from_numpy((digits << numpy.arange(bits)).sum(2) - 2 ** (bits - 1))


def loaded_differences(source: Path, artifact: Path, manifest: dict[str, Any], values: dict[str, Tensor]) -> list[str]:
    """How the artifact, as transformers loads it, differs from the source's model with `values` in place of weights."""
    cls = getattr(transformers, manifest["architecture"])
    meant = cls.from_pretrained(source, dtype="auto").eval()
    for name, entry in manifest["weights"].items():
        put(meant, entry, values[name])
    loader, trust = cls, False
    if manifest["route"] == "custom":
        autos = json.loads((artifact / "config.json").read_text())["auto_map"]
        loader, trust = getattr(transformers, next(name for name in autos if name != "AutoConfig")), True
    found, info = loader.from_pretrained(artifact, output_loading_info=True, trust_remote_code=trust)
    known = {key for keys in manifest["carried"].values() for key in keys}
    differs = [f"{kind}: {sorted(info[kind])[:4]}" for kind in ("missing_keys", "mismatched_keys") if info[kind]]
    if more := sorted(set(info["unexpected_keys"]) - known):
        differs.append(f"unexpected_keys: {more[:4]}")
    for model in (meant, found.eval()):
        use_eager_experts(model.config)
    if hasattr(found.config, "_is_quantized"):  # the code of Jamba then computes a sum in another order
        meant.config._is_quantized = found.config._is_quantized
    inputs = example_batch(meant, torch.device("cpu"))
    with torch.no_grad():
        outputs = [model(**inputs)[0] for model in (meant, found, found)]
    if not bool(torch.isfinite(outputs[0]).all()):
        differs.append("the outputs of the source with the values of the codes are not finite")
    elif not all(torch.equal(outputs[0], output) for output in outputs[1:]):
        distance = (outputs[1].float() - outputs[0].float()).norm() / outputs[0].float().norm()
        differs.append(f"outputs have a relative distance of {float(distance):.3g} from the meant ones")
    return differs + held_differences(meant, found, {entry["parameter"] for entry in manifest["weights"].values()})


def put(model: Any, entry: dict[str, Any], value: Tensor) -> None:
    place = model.get_parameter(entry["parameter"]).data
    if entry["expert"] is not None:
        place = place[entry["expert"]]
    place = place.t() if entry["transposed"] else place
    if entry["rows"] is not None:
        place = place[entry["rows"][0] : entry["rows"][1]]
    place.copy_(value)


def held_differences(meant: Any, found: Any, stored: set[str]) -> list[str]:
    """Parameters and buffers of `meant` that `found` holds otherwise. Packed modules are left to their outputs.

    stored  the parameters that weights in a format are parts of
    """
    tensors = {
        name: value
        for kind in (found.named_parameters, found.named_buffers)
        for name, value in kind(remove_duplicate=False)
    }
    differs = []
    for kind in (meant.named_parameters, meant.named_buffers):
        for name, value in kind(remove_duplicate=False):
            is_packed = name not in tensors and (f"{name}_packed" in tensors or name in stored)
            if not is_packed and not (name in tensors and equal(value, tensors[name])):
                differs.append(f"{name} is {described(tensors[name]) if name in tensors else 'missing'} once loaded")
    return differs
