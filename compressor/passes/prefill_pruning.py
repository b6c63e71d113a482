"""LazyLLM: drops prompt tokens that get little attention, and takes them back if a later token needs them.

Paper: Fu, Cho, Merth, Mehta, Rastegari, Najibi 2024, "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM
Inference", arXiv 2407.14057 (the abstract and public summaries were read, not the body). The time to the first token
is spent on the prompt. After chosen blocks, a gate scores each prompt token by the attention of the last token to it,
the mean over heads of softmax(q_last K^T), and keeps ceil(keep * n) tokens. Later tokens can take dropped ones back: if
a gate finds a dropped token among the ceil(keep * n) with the highest attention, it takes its hidden state from a store
and passes it on with the current token. So the following blocks compute the keys and values that they lack.

Our choices: the first tokens (`sink`) and the last one are always kept. A later token attends to all keys that exist,
not only to those that its gates would keep; this costs nothing in a model that stores them anyway. All rows of a batch
keep the same number of tokens, and padding is dropped first. If one row takes tokens back, every row takes back the
same number.

Weights stay unchanged, so files don't get smaller. Operations for a prompt of n tokens with n_l left in block l: each
block costs n_l (its weights) + 2 n_l^2 (its attention's width), and a gate costs heads * head_dim * n_l. Only prefill
becomes faster.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt

from compressor.bounds import MOST, Count
from compressor.errors import PreflightError, values_of
from compressor.model.class_changes import ClassChanges, changed_modules
from compressor.protocol import DataSize, Decision, ModelFacts, PartWork, Redefinition, TokenPass, Traits, Work

DEFAULT = ((0.25, 0.9), (0.5, 0.7), (0.75, 0.5))  # (depth, keep); ours: early blocks can't tell which tokens matter
NOTE = (
    "tokens are dropped only from prompts with a cache, as in generation; scores of whole texts, such as perplexity, "
    "are those of the model without gates"
)


class PrefillPruning(TokenPass):
    """Drop tokens of long prompts block by block while the first token is computed."""

    title: ClassVar[str] = "Drops prompt tokens during prefill, and takes them back if needed (LazyLLM)"
    paper: ClassVar[str] = "Fu et al. 2024, arXiv 2407.14057"

    keep: dict[NonNegativeInt, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        description="Share of the tokens that is kept after a block, by block number. null: 0.9, 0.7 and 0.5 at a "
        "quarter, half and three quarters of the depth.",
    )
    sink: NonNegativeInt = Field(
        4, le=MOST, description="Number of tokens at the start of the prompt that are always kept."
    )
    min_prompt: Count = Field(256, description="Number of tokens below which a prompt is not pruned.")
    revive: bool = Field(True, description="Let later tokens bring back dropped tokens that they attend to.")

    @property
    def traits(self) -> Traits:
        return Traits(reads="weights")

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> Work:
        return Work()  # it reads only the config

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The config with token gates. raises PreflightError for a missing block, or blocks that can't have gates"""
        prefix = re.escape(model.blocks) + r"\.(\d+)\."
        found = (re.match(prefix, name) for name in model.shapes)
        depth = 1 + max(int(match[1]) for match in found if match)
        keep = self.keep if self.keep is not None else {int(at * depth): share for at, share in DEFAULT}
        for number in sorted(keep):
            if number >= depth - 1:
                what = "is the last one, after which a gate saves nothing" if number == depth - 1 else "doesn't exist"
                raise PreflightError(
                    f"block {number} {what}; the model has {depth} blocks",
                    where="prefill_pruning.keep",
                    hint=f"Name blocks from 0 to {depth - 2}.",
                    data={
                        "reason": "last-block" if number == depth - 1 else "no-block",
                        "block": number,
                        "blocks": depth,
                    },
                )
        gates = {number: share for number, share in keep.items() if share < 1}
        if not gates:
            return Redefinition(notes=("every token is kept: nothing is changed",))
        modules = changed_modules(model.config)
        for number in range(depth):
            path = f"{model.blocks}.{number}"
            if path in modules:
                raise PreflightError(
                    f"{path} is a {modules[path]['form']} already and can't also get a gate",
                    where="prefill_pruning",
                    hint="Remove one of the two steps from the recipe.",
                    data={"reason": "already-replaced", "block": path, "form": modules[path]["form"]},
                )
            format_params = {
                "number": number,
                "begin": min(gates),
                "last": number == depth - 1,
                "keep": gates.get(number),
                "sink": self.sink,
                "min_prompt": self.min_prompt,
                "revive": self.revive,
            }
            modules[path] = {"form": "lazy_block", "spec": format_params, "shape": []}
        redefinition = Redefinition(ClassChanges(compressed_modules=modules), notes=(NOTE,))
        if (why := model.fits(redefinition)) is not None:
            raise PreflightError(
                f"tokens of {model.architecture} can't be dropped in prefill: {why}",
                where="prefill_pruning",
                hint="Use a causal language model whose blocks take a cache, or zero_tprune for an encoder.",
                data={"reason": "not-gated", "model": model.architecture, "because": values_of(why)},
            )
        return redefinition
