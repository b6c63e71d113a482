"""Loads an artifact in a fresh process, as a user would, and compares it with what was built and with its source.

Three models come one after the other: the artifact by its stock loader, the artifact by `compressor.load`, and the
source by stock transformers (`against_source`), which gets the artifact's stored layers. All three have to
compute the same, and what was computed in memory while the artifact was built.

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

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.process.child import ask

GENERATED_TOKENS = 8
OURS = "compressor.load"  # in messages


def verify_in_child(
    directory: Path,
    probe: Path | None,
    *,
    sealed: bool,
    deep: bool = True,
    source: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run the checks in a fresh process and return its findings; `problems` is empty when all is well.

    probe   safetensors with the inputs and `output` of the in-memory result; None compares the loaders only
    sealed  whether the manifest covers every file already
    source  directory of the checkpoint that the artifact was made of; None: `not_compared` says that it wasn't there
    raises  what `verify` raises, and what `child.ask` does
    """
    from compressor.artifact.manifest import read_manifest
    from compressor.artifact.stock_formats import check_loader

    check_loader(read_manifest(directory)["route"])
    request = {
        "directory": str(directory),
        "probe": str(probe) if probe else None,
        "sealed": sealed,
        "deep": deep,
        "source": str(source) if source else None,
        "trust_remote_code": trust_remote_code,
    }
    found: dict[str, Any] = ask("compressor.artifact.verify", request, "verifies the artifact")
    return found


def verify(
    directory: Path,
    probe: Path | None,
    *,
    sealed: bool,
    deep: bool,
    source: Path | None = None,
    trust_remote_code: bool = False,
    source_limit: int | None = None,
) -> dict[str, Any]:
    """All checks, in this process. See verify_in_child.

    source_limit  bytes that the source's model may take in memory; None: most of what is available
    """
    import torch
    from safetensors.torch import load_file
    from transformers.utils import logging

    from compressor.artifact.against_source import prints_of, ties_of
    from compressor.artifact.files import compare_files
    from compressor.artifact.loader import load
    from compressor.artifact.manifest import read_manifest
    from compressor.artifact.stock_formats import FAMILIES
    from compressor.artifact.stock_loading import load_stock, stock_works
    from compressor.model.block_runner import without_cache
    from compressor.model.checkpoint import open_checkpoint
    from compressor.model.probe_model import use_eager_experts
    from compressor.model.side_files import OWN_MODELING
    from compressor.model.trusted_code import carried_code_problems

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
        "source": None,
        "not_compared": None,
        "problems": [],
    }
    problems: list[str] = found["problems"]
    manifest = read_manifest(directory)
    if sealed:
        found_there, found["notes"] = compare_files(directory, manifest)
        problems += found_there
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.tensors.keys() - manifest.get("carried", {}).keys():
        tensor = checkpoint.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} holds NaN or Inf")
    problems += carried_code_problems(directory, source, trust_remote_code, OWN_MODELING)
    if problems or not deep:
        return found
    stock, info = load_stock(directory, manifest)
    found["stock_load"] = True
    carried = {name for reported in manifest.get("carried", {}).values() for name in reported}
    for key in ("missing", "unexpected", "mismatched"):
        names = {str(name) for name in info[f"{key}_keys"]}
        found[key] = sorted(names - carried if key == "unexpected" else names)  # what is carried is no one's
        if found[key]:
            problems.append(f"stock loading reports {len(found[key])} {key} tensors, such as {found[key][0]}")
    use_eager_experts(stock.config)
    with torch.no_grad(), without_cache(stock), stock_works(directory):
        inputs = load_file(probe) if probe else _example(stock)
        expected = inputs.pop("output", None)
        outputs = {name: _output(stock(**inputs)) for name in ("stock loader", "stock loader, second run")}
    prints, ties = prints_of(stock), ties_of(stock)
    blocks = getattr(stock.config.get_text_config(), "num_hidden_layers", 1)
    eps, can_generate = torch.finfo(stock.dtype).eps, stock.can_generate()
    forward = FAMILIES[manifest["route"]].forward if manifest["route"] in FAMILIES else None
    if forward is None:
        stock = None  # its memory is free for the next model
    own: Any = load(directory, check_hashes=False, kernels="reference")
    found["own_load"] = True
    use_eager_experts(own.config)
    with torch.no_grad(), without_cache(own), stock_works(directory, who=OURS):
        outputs["own loader"] = _output(own(**inputs))
    reference = expected if expected is not None else next(iter(outputs.values())).float()
    for name, value in outputs.items():
        if value.shape != reference.shape:
            problems.append(f"{name}: outputs have shape {tuple(value.shape)}, {tuple(reference.shape)} is right")
    if problems:
        return found
    if forward is not None:
        with stock_works(directory, who="the comparison of its layers"):
            layers, found_there = _compare_layers(stock, own, inputs, manifest, forward)
        by_stock = outputs.pop("stock loader")
        layers["max_logit_difference"] = float((by_stock.float() - outputs["own loader"].float()).abs().max())
        found["stock_layers"] = layers
        problems += found_there
        if not torch.equal(outputs.pop("stock loader, second run"), by_stock):
            problems.append("stock loader: a second run gives other outputs")
        stock = None
    failure = theirs = None
    if can_generate and "input_ids" in inputs:
        found["generated_tokens"], failure = _generate(own, inputs)
    if source is None:
        found["not_compared"] = "the source wasn't at hand"
    else:
        request = SourceRequest(source, trust_remote_code, source_limit, generates=failure is None)
        theirs = _compare_source(request, own, checkpoint, manifest, prints, ties, inputs, outputs, found)
    if failure is not None and failure == theirs:
        found["notes"].append(f"no tokens were generated, since the source can't either: {failure}")
    elif failure is not None:
        problems.append(f"generate fails: {failure}")
    reference = expected if expected is not None else next(iter(outputs.values())).float()
    found["tolerance"] = float((blocks + 1) * eps * reference.abs().max())
    differences = {name: float((value.float() - reference).abs().max()) for name, value in outputs.items()}
    found["max_logit_difference"] = max(differences.values())
    for name, difference in differences.items():
        if not bool(torch.isfinite(outputs[name]).all()):
            problems.append(f"{name}: outputs hold NaN or Inf")
        elif not difference <= found["tolerance"]:  # NaN fails too
            problems.append(f"{name}: outputs differ by {difference:.3g}, {found['tolerance']:.3g} is allowed")
    return found


@dataclass(frozen=True)
class SourceRequest:
    """The checkpoint that an artifact is compared with; `limit` as `verify` has it.

    generates  the artifact's model can generate; where it can't the source is asked, too
    """

    directory: Path
    trust_remote_code: bool
    limit: int | None
    generates: bool


def _compare_source(
    request: SourceRequest,
    own: Any,
    artifact: Any,
    manifest: dict[str, Any],
    prints: dict[str, Any],
    ties: set[frozenset[str]],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    found: dict[str, Any],
) -> str | None:
    """Compare with the source, as `against_source` has it; adds to `found` and, to be judged, to `outputs`.

    own       the artifact by `compressor.load`; its layers go into the source's model
    artifact  its checkpoint
    returns   why the source can't generate either, if it was asked
    """
    import tempfile

    import torch

    from compressor.artifact import against_source
    from compressor.artifact.stock_loading import stock_works
    from compressor.errors import ModelError
    from compressor.model.block_runner import without_cache
    from compressor.model.checkpoint import open_checkpoint
    from compressor.model.probe_model import use_eager_experts

    problems = found["problems"]
    changes, _ = against_source.read_changes(manifest)
    checkpoint = open_checkpoint(request.directory, trust_remote_code=request.trust_remote_code)
    if (reason := against_source.why_not_comparable(checkpoint)) is not None:
        found["not_compared"] = reason
        return None
    dtype = getattr(torch, artifact.config["dtype"])
    rewritten = [change for change in changes if change["rewrites"]]
    offload = against_source.does_not_fit(checkpoint, dtype, request.limit)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-model-"))) if offload else None
        stack.enter_context(stock_works(request.directory, ModelError))
        source = against_source.load_source(
            request.directory, checkpoint, dtype, trust_remote_code=request.trust_remote_code, offload=scratch
        )
        use_eager_experts(source.config)
        with torch.no_grad(), without_cache(source):
            plain = _output(source(**inputs))
        failure = None if request.generates else _generate(source, inputs)[1]
        distance = against_source.compare_outputs(outputs["own loader"], plain)
        compared = {"loaded_to": "disk" if offload else "memory", "output_distance": distance}
        if not bool(torch.isfinite(plain).all()):
            problems.append("the source, loaded by stock transformers, gives NaN or Inf too: set model.dtype")
        if rewritten:
            problems += against_source.compare_reading(source, request.directory, dtype, request.trust_remote_code)
            kept = not manifest["weights"] and all(change["keeps_function"] for change in changes)
            blocks = getattr(source.config.get_text_config(), "num_hidden_layers", 1)
            allowed = against_source.ROUNDING_UNITS * (blocks + 1) * torch.finfo(dtype).eps
            if kept and not (distance is not None and distance <= allowed):  # NaN fails too
                problems.append(
                    f"outputs differ from the source's by {distance} of their size, {allowed:.3g} is allowed: "
                    f"{', '.join(change['pass'] for change in rewritten)} should keep them"
                )
        else:
            numbers, found_there = against_source.compare_tensors(source, own, dtype, prints, ties, manifest)
            compared |= numbers
            problems += found_there
            if not changes and not found_there:
                with (
                    torch.no_grad(),
                    without_cache(source),
                    stock_works(artifact.directory, who="the source with its layers"),
                ):
                    against_source.put_layers(source, own, manifest)
                    outputs["source with the artifact's layers"] = _output(source(**inputs))
        found["source"] = compared
    return failure


def _generate(model: Any, inputs: dict[str, Any]) -> tuple[int | None, str | None]:
    """How many new tokens `generate` makes of a prompt, or why it makes another number than it should."""
    import torch

    from compressor.process.resources import ran_out

    prompt = inputs["input_ids"][:1, :8]
    try:
        made = model.generate(
            prompt,
            max_new_tokens=GENERATED_TOKENS,
            min_new_tokens=GENERATED_TOKENS,
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
    except Exception as error:  # any: what a class makes of a cache, or of few blocks, is its own
        if (lack := ran_out(error)) is not None:
            raise lack from error
        return None, f"{type(error).__name__}: {str(error)[:300]}"
    count = int(made.shape[1] - prompt.shape[1])
    return count, None if count == GENERATED_TOKENS else f"it makes {count} of {GENERATED_TOKENS} tokens"


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

    from compressor.model.probe_model import example_batch

    return example_batch(model, torch.device("cpu"), samples=2, tokens=32)


def _output(output: Any) -> Any:
    return output.logits if "logits" in output else output.last_hidden_state


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer `verify_in_child`, in the fresh process."""
    probe = Path(request["probe"]) if request["probe"] else None
    return verify(
        Path(request["directory"]),
        probe,
        sealed=request["sealed"],
        deep=request["deep"],
        source=Path(request["source"]) if request["source"] else None,
        trust_remote_code=request["trust_remote_code"],
    )
