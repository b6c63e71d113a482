"""Loads an artifact in a fresh process, as a user would, and compares what it computes with what was built.

Tolerance. Both loaders rebuild the same weights from the same codes in the same dtype, so logits may differ only by the
order of sums (other kernels, fused experts). One rounding step per block and one at the head, each of half a unit in
the last place of the largest activation, gives (blocks + 1) * eps(dtype) * max|logit| as a bound that a wrong code or
scale exceeds; differences seen so far are 0. Experts are compared one at a time, as they were
calibrated: routing jumps, so a fused expert kernel's rounding alone can send a token elsewhere.

Stock loaders with layers of their own (bitsandbytes) compute something else than ours on purpose, and no useful bound
on the logits follows: a last bit can move an int8 code in a later layer. So they are held to it layer by layer, on the
inputs that our model's layers read: every output within what `Family.forward` allows, every tensor of the rest of the
model equal bit for bit. How far the logits end up apart is reported and not judged; our own loader is, as above.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.child import ask

GENERATED_TOKENS = 8


def verify_in_child(directory: Path, probe: Path | None, *, sealed: bool, deep: bool = True) -> dict[str, Any]:
    """Run the checks in a fresh process and return its findings; `problems` is empty when all is well.

    probe   safetensors with the inputs and `output` of the in-memory result; None compares the two loaders only
    sealed  whether the manifest covers every file already
    raises  what `verify` raises, and what `child.ask` does
    """
    from compressor.artifact import read_manifest
    from compressor.export import check_loader

    check_loader(read_manifest(directory)["route"])
    request = {"directory": str(directory), "probe": str(probe) if probe else None, "sealed": sealed, "deep": deep}
    found: dict[str, Any] = ask("compressor.verify", request, "verifies the artifact")
    return found


def verify(directory: Path, probe: Path | None, *, sealed: bool, deep: bool) -> dict[str, Any]:
    """All checks, in this process. See verify_in_child."""
    import torch
    from safetensors.torch import load_file
    from transformers.utils import logging

    from compressor.artifact import load, read_manifest
    from compressor.artifact_files import compare_files
    from compressor.checkpoint import open_checkpoint
    from compressor.export import FAMILIES
    from compressor.replay import without_cache
    from compressor.stock_loading import load_stock, stock_works
    from compressor.tracing import use_eager_experts

    logging.disable_progress_bar()
    found: dict[str, Any] = {
        "stock_load": None,
        "own_load": None,
        "missing": [],
        "unexpected": [],
        "mismatched": [],
        "max_logit_difference": None,
        "tolerance": None,
        "generated_tokens": None,
        "stock_layers": None,
        "notes": [],
        "problems": [],
    }
    problems: list[str] = found["problems"]
    manifest = read_manifest(directory)
    if sealed:
        found_there, found["notes"] = compare_files(directory, manifest)
        problems += found_there
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} holds NaN or Inf")
    if problems or not deep:
        return found
    stock, info = load_stock(directory, manifest)
    found["stock_load"] = True
    for key in ("missing", "unexpected", "mismatched"):
        found[key] = sorted(str(name) for name in info[f"{key}_keys"])
        if found[key]:
            problems.append(f"stock loading reports {len(found[key])} {key} tensors, such as {found[key][0]}")
    own: Any = load(directory, check_hashes=False, kernels="reference")
    found["own_load"] = True
    for model in (stock, own):
        use_eager_experts(model.config)
    inputs = load_file(probe) if probe else _example(stock)
    expected = inputs.pop("output", None)
    with torch.no_grad(), without_cache(stock, own):
        with stock_works(directory):
            outputs = {name: _output(stock(**inputs)) for name in ("stock", "stock, second run")}
        outputs["own"] = _output(own(**inputs))
    forward = FAMILIES[manifest["route"]].forward if manifest["route"] in FAMILIES else None
    if forward is not None:
        layers, found_there = _compare_layers(stock, own, inputs, manifest, forward)
        layers["max_logit_difference"] = float((outputs["stock"].float() - outputs["own"].float()).abs().max())
        found["stock_layers"] = layers
        problems += found_there
        if not torch.equal(outputs.pop("stock, second run"), outputs.pop("stock")):
            problems.append("stock loader: a second run gives other outputs")
    reference = expected if expected is not None else next(iter(outputs.values())).float()
    blocks = getattr(stock.config.get_text_config(), "num_hidden_layers", 1)
    eps = torch.finfo(stock.dtype).eps
    found["tolerance"] = float((blocks + 1) * eps * reference.abs().max())
    differences = {name: float((value.float() - reference).abs().max()) for name, value in outputs.items()}
    found["max_logit_difference"] = max(differences.values())
    for name, difference in differences.items():
        if not difference <= found["tolerance"]:  # NaN fails too
            problems.append(f"{name} loader: outputs differ by {difference:.3g}, {found['tolerance']:.3g} is allowed")
    if stock.can_generate() and "input_ids" in inputs:
        prompt = inputs["input_ids"][:1, :8]
        made = own.generate(
            prompt,
            max_new_tokens=GENERATED_TOKENS,
            min_new_tokens=GENERATED_TOKENS,
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
        found["generated_tokens"] = made.shape[1] - prompt.shape[1]
        if found["generated_tokens"] != GENERATED_TOKENS:
            problems.append(f"generate made {found['generated_tokens']} of {GENERATED_TOKENS} tokens")
    return found


def _compare_layers(
    stock: Any, own: Any, inputs: dict[str, Any], manifest: dict[str, Any], forward: Any
) -> tuple[dict[str, Any], list[str]]:
    """Hold each layer of a stock loader to what it should make of the inputs that ours reads.

    returns  how many were compared and the largest share of what is allowed; the problems
    """
    import torch

    read: dict[str, Any] = {}

    def keep_input(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            read.setdefault(name, args[0])

        return hook

    names = sorted(entry["parameter"].removesuffix(".weight") for entry in manifest["weights"].values())
    hooks = [own.get_submodule(name).register_forward_pre_hook(keep_input(name)) for name in names]
    with torch.no_grad():
        own(**inputs)
    for hook in hooks:
        hook.remove()
    problems, largest = [], 0.0
    theirs = dict(stock.named_parameters())
    for name, value in own.named_parameters():
        if name in theirs and not torch.equal(theirs[name], value):
            problems.append(f"stock loader: {name} is not what was written")
    for name in names:
        layer, module = own.get_submodule(name), stock.get_submodule(name)
        if not torch.equal(module.weight, layer.weight):
            problems.append(f"stock loader: the codes of {name} are not what was written")
        with torch.no_grad():
            expected, allowed = forward(layer, read[name])
            share = float(((module(read[name]).float() - expected).abs() / allowed).max())
        if not share <= 1:  # NaN fails too
            problems.append(f"stock loader: {name} differs by {share:.3g} times what its roundings allow")
        largest = max(largest, share)
    return {"compared": len(names), "largest_share_of_allowed": largest}, problems


def _example(model: Any) -> dict[str, Any]:
    import torch

    from compressor.tracing import example_batch

    return example_batch(model, torch.device("cpu"), samples=2, tokens=32)


def _output(output: Any) -> Any:
    return output.logits if "logits" in output else output.last_hidden_state


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer `verify_in_child`, in the fresh process."""
    probe = Path(request["probe"]) if request["probe"] else None
    return verify(Path(request["directory"]), probe, sealed=request["sealed"], deep=request["deep"])
