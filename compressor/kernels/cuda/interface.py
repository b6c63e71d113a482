"""Defines the interface of the CUDA launchers: types, error codes and addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from compressor.errors import KernelError, ShapeError

BAD_CALL = -1  # a launcher's result for a shape, type, address or workspace that no kernel accepts
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # device.h: Type
LOWEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Kernels:
    """The launchers on one device.

    name        such as "nvrtc, sm_90a"
    functions   by the names of plans.PLANS and plans.SIZES; a launcher has the arguments of its plan and the stream.
                Addresses are ints, 0 for none. It returns 0, BAD_CALL or an error of the driver
    error_text  gives the meaning of an error
    """

    name: str
    functions: Mapping[str, Callable[..., int]]
    error_text: Callable[[int], str]

    def error(self, code: int, what: str) -> ShapeError | KernelError:
        """The error for a launcher's result other than 0."""
        data = {"call": what, "kernels": self.name, "code": code}
        if code == BAD_CALL:
            return ShapeError(f"{what}: {self.name} takes no such shapes", data={"reason": "bad-call", **data})
        text = f"{what}: {self.name} failed: {self.error_text(code)} ({code})"
        return KernelError(
            text,
            hint="Load with kernels='reference', and report this message with the name of the GPU.",
            data={"reason": "launch", **data},
        )
