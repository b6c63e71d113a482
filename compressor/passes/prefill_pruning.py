"""LazyLLM: prompt tokens that the next word doesn't look at are not computed in later blocks, unless a word needs them.

Paper: Fu, Cho, Merth, Mehta, Rastegari, Najibi 2024, "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM
Inference", arXiv 2407.14057 (the abstract and public summaries were read, not the body). Time to the first word is
spent on the prompt. Behind chosen blocks a gate weighs each token by what the last one attends to there, the mean over
heads of softmax(q_last K^T), and lets ceil(keep * n) go on. Later words come back to what stayed behind: a gate that
finds a waiting token among the ceil(keep * n) most looked at takes its hidden state from the store and sends it on with
the word, so that the blocks behind it compute the keys and values they lack.

Our choices: the first tokens (`sink`) and the last one always go on; a later word attends to all keys there are, not
only to those it would have chosen, which costs it nothing in a model that holds them anyway; rows of a batch keep
equally many, padding first among those that stay behind, and one row's revival takes the same number from each.

Weights stay as they are, so files don't shrink. Operations of a prompt of n tokens with n_l left in block l: each block
costs n_l (its weights) + 2 n_l^2 (its attention's width), and a gate heads * head_dim * n_l. The gain is in prefill
alone.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt

from compressor.bounds import MOST, Count
from compressor.errors import PreflightError, values_of
from compressor.protocol import Decision, ModelFacts, Redefinition, TokenPass, Traits

DEFAULT = ((0.25, 0.9), (0.5, 0.7), (0.75, 0.5))  # (depth, keep); our choice: early blocks don't know yet what matters
NOTE = (
    "tokens are dropped in prompts that go through a cache, as in generation; scores of whole texts, perplexity among "
    "them, are those of the model without gates"
)


class PrefillPruning(TokenPass):
    """Tokens of long prompts dropped block by block while the first word is computed."""

    title: ClassVar[str] = "Prompt tokens dropped on the way to the first word, and taken back when needed"
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

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """raises PreflightError for a block that isn't there, or a model whose blocks can't be gated"""
        prefix = re.escape(model.blocks) + r"\.(\d+)\."
        found = (re.match(prefix, name) for name in model.shapes)
        depth = 1 + max(int(match[1]) for match in found if match)
        keep = self.keep if self.keep is not None else {int(at * depth): share for at, share in DEFAULT}
        for number in sorted(keep):
            if number >= depth - 1:
                what = "is the last one, behind which nothing is saved" if number == depth - 1 else "isn't there"
                raise PreflightError(
                    f"block {number} {what}; the model has {depth}",
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
            return Redefinition(notes=("every token goes on: nothing is changed",))
        modules = dict(model.config.get("compressed_modules") or {})
        for number in range(depth):
            path = f"{model.blocks}.{number}"
            if path in modules:
                raise PreflightError(
                    f"{path} is a {modules[path]['form']} already and can't be gated as well",
                    where="prefill_pruning",
                    hint="Remove one of the two steps from the recipe.",
                )
            spec = {
                "number": number,
                "begin": min(gates),
                "last": number == depth - 1,
                "keep": gates.get(number),
                "sink": self.sink,
                "min_prompt": self.min_prompt,
                "revive": self.revive,
            }
            modules[path] = {"form": "lazy_block", "spec": spec, "shape": []}
        redefinition = Redefinition({"compressed_modules": modules}, notes=(NOTE,))
        if (why := model.fits(redefinition)) is not None:
            raise PreflightError(
                f"tokens of {model.architecture} can't be dropped in prefill: {why}",
                where="prefill_pruning",
                hint="Use a causal language model whose blocks take a cache, or zero_tprune for an encoder.",
                data={"reason": "not-gated", "model": model.architecture, "because": values_of(why)},
            )
        return redefinition
