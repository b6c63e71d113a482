"""A whole model in memory as passes that choose see it (`protocol.RunnableModel`), and where its masks sit, by hand."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor

from compressor.analysis.residual_stream import residual_of
from compressor.methods.pruning.masked_forward import MaskedProjection, Places, StreamNorm
from compressor.model.block_runner import Pieces
from compressor.model.structure import find_blocks


class Whole:
    """Blocks only run inside `loaded`; `most_loaded` counts how many were at a time, `states` what was saved."""

    def __init__(self, model, batches, labels=None, seed=0, facts=None):
        self.model, self.inputs, self.given_labels = model.requires_grad_(False).eval(), batches, labels
        model.config.use_cache = False
        self.pieces = Pieces(model, find_blocks(model))
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.facts, self.warnings = facts, []
        self.calls, self.states, self.state = {}, [], None
        self.open, self.most_loaded = set(), 0

    @property
    def parts(self):
        return len(self.pieces) + 2

    @property
    def batches(self):
        return len(self.inputs)

    def labels(self, batch):
        return None if self.given_labels is None else self.given_labels[batch]

    def module(self, path):
        return self.model.get_submodule(path)

    @contextmanager
    def loaded(self, unit):
        self.open.add(unit)
        self.most_loaded = max(self.most_loaded, len(self.open))
        yield
        self.open.remove(unit)

    def keep_blocks(self, nbytes):
        pass

    def embeddings(self, batch):
        hidden, self.calls[batch] = self.pieces.embeddings(self.inputs[batch])
        return hidden

    def run(self, unit, batch, hidden):
        assert unit in self.open
        return self.pieces.block(unit - 1, hidden, self.calls[batch][unit - 1], gradients=True)

    def output_head(self, batch, hidden, samples=slice(None)):
        chosen = {name: value[samples] for name, value in self.inputs[batch].items()}
        return self.pieces.output_head(chosen, hidden, gradients=True)

    def save(self, step, tensors):
        self.state = (step, {name: value.clone() for name, value in tensors.items()})
        self.states.append(self.state)

    def saved(self):
        return self.state

    def progress(self, what, share=None):
        pass

    def warn(self, code, where, message, /, **data):
        self.warnings.append(code)


# family -> (projection of the heads, columns of a unit; that of the MLP), in a block of a model of tests/support/tiny
READERS = {
    "llama": ("self_attn.o_proj", 16, "mlp.down_proj"),  # two query heads of 8 to a key-value head
    "opt": ("self_attn.out_proj", 8, "fc2"),
    "gpt2": ("attn.c_proj", 8, "mlp.c_proj"),
    "bert": ("attention.output.dense", 8, "output.dense"),
}


def places(family, model, switches=False):
    """Masks on heads and MLP units of every block."""
    heads, columns, ffn = READERS[family]
    blocks = find_blocks(model)
    found = []
    for number in range(len(model.get_submodule(blocks))):
        path = f"{blocks}.{number}"
        for module, each in ((f"{path}.{heads}", columns), (f"{path}.{ffn}", 1)):
            features = 32 if each > 1 else 64
            name = module.rpartition(".")[0] if family != "opt" else module
            switch = f"{name}/whole" if switches else None
            found.append(
                MaskedProjection(
                    name, number + 1, module, torch.arange(features // each).repeat_interleave(each), switch
                )
            )
    return Places(tuple(found))


def masks(placed, rows, seed=0):
    """Random factors around 1 for every mask, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {projection.name: int(projection.columns.max()) + 1 for projection in placed.projections}
    sizes |= {projection.switch: 1 for projection in placed.projections if projection.switch}
    return {name: (1 + 0.3 * torch.randn(rows, n, generator=generator)).requires_grad_() for name, n in sizes.items()}


def token_batches(count, rows, length, seed=0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 96, (rows, length), generator=generator)} for _ in range(count)]


def stream_norms(model):
    residual = residual_of(model, Pieces(model, find_blocks(model)))
    norms = [
        StreamNorm(n + 1, norm.module, norm.formula)
        for n, b in enumerate(residual.blocks)
        for s in b
        for norm in s.norms
    ]
    return (*norms, StreamNorm(len(residual.blocks) + 1, residual.end.module, residual.end.formula))
