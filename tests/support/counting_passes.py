"""Passes whose result depends on the parts before: one passes a count on, the others do what they must not."""

from __future__ import annotations

import torch

from compressor.protocol import Redefinition, RewritePass, TokenPass, Traits, WeightPass

SEEN = []  # of `Forgetful`: lost when a run is interrupted
DECISIONS = []  # of `Decides` and `Chooses`: what each part or the second plan got


class Counting(RewritePass):
    """Multiplies the output projections of block n by 1 + n / 8, and counts blocks in its state."""

    in_place: bool = False

    @property
    def traits(self):
        return Traits(reads="weights")

    def redefine(self, model, decision):
        return Redefinition()

    def survey(self, views):
        return {"count": torch.zeros(1), "far": torch.ones(3)}

    def rewrite(self, view, state):
        if not view.sublayers:
            return state
        _scale(view, 1 + float(state["count"]) / 8)
        if self.in_place:
            state["count"] += 1
            return state
        return {**state, "count": state["count"] + 1}


class Forgetful(Counting):
    """Counts in the module."""

    def rewrite(self, view, state):
        if view.index < 0:
            SEEN.clear()
        if view.sublayers:
            _scale(view, 1 + len(SEEN) / 8)
            SEEN.append(view.index)
        return state


class LeavesOut(WeightPass):
    """Stores nothing and says nothing."""

    @property
    def traits(self):
        return Traits(reads="weights")

    def stored(self, weight):
        return "dense"

    def block(self, view):
        pass


class Decides(WeightPass):
    """Has a choice of its own, and doesn't mention it in `decides`."""

    @property
    def traits(self):
        return Traits(reads="inputs")

    def stored(self, weight):
        return "dense"

    def decide(self, model):
        return {"parts": sum(1 for _ in model.views())}

    def block(self, view):
        DECISIONS.append(view.decision)
        for stage in view.stages():
            for group in stage:
                for weight in group:
                    view.keep(weight, reason="as decided")


class Chooses(Counting):
    """The same for a pass that changes the model."""

    def choose(self, model):
        return {"chosen": True}

    def redefine(self, model, decision):
        DECISIONS.append(decision)
        return Redefinition(decision=decision)


class ChoosesGates(TokenPass):
    """The same for a pass that drops tokens."""

    def choose(self, model):
        return {"chosen": True}


def _scale(view, by):
    for sublayer in view.sublayers:
        for write in sublayer.writes:
            view.write(write.parameter, view.read(write.parameter) * by)
