"""Makes a checkpoint's model without its weights: parameters on the meta device, and the tensors that fill them."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

from compressor.model.checkpoint import Checkpoint
from compressor.model.load_dtypes import hold, load_dtype
from compressor.model.meta_init import quick_on_meta
from compressor.model.model_building import check_buffers, empty_on_meta, guarded, most_modules
from compressor.model.probe_model import run_in_pieces
from compressor.model.tying import part
from compressor.model.weight_names import Bindings, bind


def bound_model(
    checkpoint: Checkpoint,
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: str = "source",
    *,
    cached: bool = False,
) -> tuple[Checkpoint, PreTrainedModel, Bindings, torch.dtype]:
    """A checkpoint's model on the meta device, each parameter in its dtype, and the tensors that fill it.

    cached   as in `skeleton`

    returns  the checkpoint as it is read (a shared tensor under its owner's name, ties unchanged); model; bindings; the
             model's dtype
    """
    model_dtype = load_dtype(dtype, config, checkpoint)
    name, most, failed = cls.__name__, most_modules(checkpoint), "it can't be built"
    empty = guarded(lambda config: empty_on_meta(cls, config, most, model_dtype), checkpoint, config, name, failed)
    # from here on the sizes are those of the checkpoint, so the model can be made
    bindings = bind(empty, checkpoint, model_dtype)
    check_buffers(empty, checkpoint)
    model = guarded(lambda config: skeleton(cls, config, model_dtype, cached=cached), checkpoint, config, name, failed)
    if bindings.owned:  # from here on, and in the artifact, it has the name that most checkpoints use
        tensors = {bindings.owned.get(name, name): info for name, info in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors, renamed=bindings.owned)
        bindings = bind(empty, checkpoint, model_dtype)
    if bindings.apart:
        part(model, bindings.apart)
        model.config.tie_word_embeddings = False  # what config.json means, also when it is read again
        checkpoint = replace(checkpoint, config={**checkpoint.config, "tie_word_embeddings": False})
    hold(model, bindings.dtypes)
    return checkpoint, model, bindings, model_dtype


def skeleton(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, *, cached: bool = False
) -> PreTrainedModel:
    """The model made with `dtype` in eval mode, with parameters on the meta device and real buffers.

    cached  keep the key-value cache and the family's own expert kernels, for a user of the model
    """
    config = copy.deepcopy(config) if cached else run_in_pieces(config)
    with quick_on_meta(), init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=dtype)
    _compute_buffers(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers of the class again, in float32, as from_pretrained does, which makes the model empty.

    The constructor computes them in the model's dtype, and 16-bit position embeddings differ from float32 ones.
    """
    models = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for path, module in model.named_modules():
        if any(buffer is not None for buffer in module._buffers.values()):
            owner = path
            while owner not in models:
                owner = owner.rpartition(".")[0]
            models[owner]._init_weights(module)
