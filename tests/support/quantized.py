"""Tiny quantized checkpoints, and the dense model that the owner of the format makes of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as hf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def edit(directory: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> None:
    """Change the tensors of a checkpoint in place, and set keys of its config.json."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def is_projection(name: str) -> bool:
    return name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight"))


def fp8_blocks(directory: Path, family: str = "llama", block: tuple[int, int] = (16, 8)) -> None:
    """As DeepSeek-V3 is published: float8 codes, and a scale of each block."""

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in filter(is_projection, list(tensors)):
            rows, columns = tensors[name].shape
            blocks = tensors[name].float().reshape(rows // block[0], block[0], columns // block[1], block[1])
            scale = blocks.abs().amax((1, 3), keepdim=True) / FP8_LARGEST
            tensors[name] = (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()

    tiny.save(family, directory, dtype=torch.bfloat16)
    stated = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    edit(directory, quantize, quantization_config=stated)


def owner_of_fp8_blocks(directory: Path) -> hf.PreTrainedModel:
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]
    asked = hf.FineGrainedFP8Config(weight_block_size=tuple(stated["weight_block_size"]), dequantize=True)
    return hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=asked)


def fp8_scales(directory: Path, per_row: bool = False) -> None:
    """As modelopt and fbgemm write it: one scale per tensor or per row."""

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in filter(is_projection, list(tensors)):
            largest = tensors[name].float().abs()
            scale = (largest.amax(1, keepdim=True) if per_row else largest.max().reshape(1)) / FP8_LARGEST
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            tensors[name.removesuffix("weight") + "input_scale"] = torch.ones(1)

    tiny.save("llama", directory, dtype=torch.bfloat16)
    edit(directory, quantize, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})


def owner_of_fp8_scales(directory: Path) -> hf.PreTrainedModel:
    """There is no loader for a CPU; the definition is one product."""
    tensors = load_file(directory / "model.safetensors")
    model = tiny.build("llama", dtype=torch.bfloat16)
    plain = {name: value for name, value in tensors.items() if not name.endswith("scale")}
    for name in filter(is_projection, plain):
        plain[name] = (plain[name].float() * tensors[f"{name}_scale"]).bfloat16()
    model.load_state_dict(plain)
    return model


def compressed_tensors(directory: Path, kind: str, family: str = "llama", **weights: Any) -> None:
    """By the library itself: symmetric or asymmetric codes with the range of each group, row or tensor."""
    args = QuantizationArgs(**{"type": "int", "symmetric": True, **weights})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in filter(is_projection, list(tensors)):
            value = tensors.pop(name)
            by_group = value.unflatten(1, (-1, args.group_size)) if args.group_size else value.unsqueeze(1)
            by_group = value.reshape(1, -1) if args.strategy == "tensor" else by_group
            scale, zero = calculate_qparams(by_group.amin(-1), by_group.amax(-1), args)
            state = {"weight": value, "weight_scale": scale, "weight_zero_point": zero}
            made = compressor.compress(state, scheme)
            tensors |= {name.removesuffix("weight") + leaf: made[leaf].contiguous() for leaf in made}

    tiny.save(family, directory, dtype=torch.bfloat16)
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    stated: dict[str, Any] = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    stated |= {"ignore": ["lm_head"], "config_groups": {"group_0": group}}
    edit(directory, quantize, quantization_config=stated)


def owner_of_compressed_tensors(directory: Path) -> hf.PreTrainedModel:
    asked = hf.CompressedTensorsConfig(dequantize=True)
    return hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=asked)


def own_artifact(directory: Path) -> None:
    """An artifact of this package whose weights stock transformers reads."""
    tiny.save("llama", directory.with_name("original"), dtype=torch.bfloat16)
    recipe = b"{version: 1, name: first, report: {html: false}, steps: [{pass: rtn, bits: 8, group_size: 32}]}"
    compress(parse_recipe(recipe), str(directory.with_name("original")), directory, measure=False)


def mxfp4(directory: Path) -> None:
    """As gpt-oss is published: experts in E2M1, of any codes and scales."""

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, out = tensors.pop(name).shape
            generator = torch.Generator().manual_seed(len(tensors))
            shape = (experts, out, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8, generator=generator)

    tiny.save("gpt_oss", directory, dtype=torch.bfloat16)
    edit(directory, quantize, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def owner_of_mxfp4(directory: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=hf.Mxfp4Config(dequantize=True))


def gptq(directory: Path, bits: int = 4, variant: str = "gptq", shuffled: bool = False) -> None:
    """The layout of GPTQ with any codes and zero points, packed one by one by `pack_bits`."""

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if is_projection(name) and fills_words(tensors[name], bits)]:
            out, inputs = tensors.pop(name).shape
            codes, zeros, scales, group = any_codes(name, inputs, out, bits, shuffled)
            stored = (zeros - int(variant == "gptq")) % (1 << bits)
            stem = name.removesuffix("weight")
            tensors[f"{stem}qweight"] = pack_bits(codes.T, bits).T.contiguous()
            tensors[f"{stem}qzeros"] = pack_bits(stored, bits)
            tensors |= {f"{stem}scales": scales, f"{stem}g_idx": group.int()}

    tiny.save("llama", directory, dtype=torch.bfloat16)
    stated = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": variant}
    edit(directory, quantize, quantization_config=stated)


def awq(directory: Path) -> None:
    """The layout of AWQ. Fields of a word, from the lowest: outputs 0, 2, 4, 6, 1, 3, 5 and 7."""

    def pack(values: Tensor) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return pack_bits(values.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in filter(is_projection, list(tensors)):
            out, inputs = tensors.pop(name).shape
            codes, zeros, scales, _ = any_codes(name, inputs, out, 4, False)
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}qweight": pack(codes), f"{stem}qzeros": pack(zeros), f"{stem}scales": scales}

    tiny.save("llama", directory, dtype=torch.bfloat16)
    stated = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    edit(directory, quantize, quantization_config=stated)


def owner_of_packed(directory: Path, bits: int = 4, shuffled: bool = False) -> hf.PreTrainedModel:
    """From the codes themselves, since the owners' packages need a GPU."""
    model = tiny.build("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if is_projection(name) and fills_words(parameter, bits):
            codes, zeros, scales, group = any_codes(name, parameter.shape[1], parameter.shape[0], bits, shuffled)
            parameter.data = (scales[group].double() * (codes - zeros[group]).double()).T.contiguous().bfloat16()
    return model


def fills_words(weight: Tensor, bits: int) -> bool:
    """Whether the zero points of its outputs fill int32 words, as the layout of GPTQ needs."""
    return len(weight) * bits % 32 == 0


def any_codes(name: str, inputs: int, out: int, bits: int, shuffled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (in, out) and zero points (groups, out) int64, scales (groups, out) float16, group of each input (in,)."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    codes = torch.randint(0, 1 << bits, (inputs, out), generator=generator)
    zeros = torch.randint(0, 1 << bits, (inputs // 32, out), generator=generator)
    scales = (torch.rand(inputs // 32, out, generator=generator) / (16 << bits) + 1e-3).half()
    order = torch.randperm(inputs, generator=generator) if shuffled else torch.arange(inputs)
    return codes, zeros, scales, torch.arange(inputs)[order] // 32


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into int32 words as one stream of bits, with Python's own integers."""
    rows = []
    for row in values.tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(len(row) * bits // 32)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def bitsandbytes(directory: Path, **options: Any) -> None:
    """By the library itself, while transformers loads a dense model."""
    dense = tiny.save("llama", directory.with_name("original"), dtype=torch.bfloat16)
    asked = hf.BitsAndBytesConfig(**options)
    model = hf.AutoModelForCausalLM.from_pretrained(dense, quantization_config=asked, device_map="cpu")
    model.save_pretrained(directory)


def owner_of_bitsandbytes(directory: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu").dequantize()


def dense_checkpoint(owner: hf.PreTrainedModel, family: str, directory: Path) -> Path:
    """A checkpoint with the values of the owner's model and no trace of a format."""
    model = tiny.build(family, dtype=torch.bfloat16)
    model.load_state_dict(owner.state_dict())
    model.save_pretrained(directory)
    return directory
