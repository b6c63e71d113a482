"""The sections of a recipe as frozen pydantic classes: types, defaults, and what each setting means.

docs/settings.md and the JSON Schema are generated from these classes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compressor.bounds import MOST, MOST_BYTES, MOST_SAMPLES, Count
from compressor.recipe.gates import unknown_gate, unmeasured_gates

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
Metric = Literal[
    "perplexity", "kl_divergence", "top1_agreement", "hidden_cosine", "accuracy", "size", "speed", "memory"
]
SHA256 = r"^[0-9a-f]{64}$"


def parse_bytes(value: Any) -> Any:
    """4GiB, 500MB or a number -> bytes; anything else is left for the schema to refuse."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", value)
    if not found or found[2].upper() not in UNITS:
        raise PydanticCustomError("no-size", "give bytes as a number with KiB, MiB, GiB (1024) or KB, MB, GB (1000)")
    size = float(found[1]) * UNITS[found[2].upper()]
    if size > MOST_BYTES:  # infinite, too
        raise PydanticCustomError("size-limit", "no machine has more than 1 EiB (2^60 bytes)", {"limit": MOST_BYTES})
    return int(size)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0, le=MOST_BYTES)]


def bare_source(source: str) -> str:
    """A data source as it may be told to others: a path that says where it lies on this machine by its last part."""
    kind, colon, name = source.partition(":") if source.startswith("dataset:") else ("", "", source)
    path = Path(os.path.expanduser(name))
    return f"{kind}{colon}{path.name}" if path.is_absolute() or ".." in path.parts else source


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """How the model is held while it is compressed."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source", description="Type of what stays dense."
    )
    placement: Literal["stream", "resident"] = Field(
        "stream", description="stream frees each block when it is done; resident keeps all of them."
    )


class DataSettings(Section):
    """Text or images, as the model reads them."""

    source: str = Field(
        "stdlib",
        min_length=1,
        description="stdlib, random, the path of a file or of a saved data set, or dataset:NAME.",
    )
    config: str | None = Field(None, description="Configuration of dataset:NAME.")
    split: str = Field("train", description="Split of a data set; stdlib has train and heldout.")
    field: str = Field("text", description="Column or JSON key that holds the text, or chats.")
    samples: int = Field(128, ge=1, le=MOST_SAMPLES, description="How many samples are drawn.")
    length: int = Field(
        512, ge=2, le=MOST, description="Tokens per sample. Unset: 512, or what the model takes if it is less."
    )
    pack: bool = Field(True, description="Join documents and cut to exact length; false: one document a sample.")
    seed: int | None = Field(None, ge=0, lt=2**32, description="Choice of samples; null is the recipe's seed.")
    sha256: str | None = Field(None, pattern=SHA256, description="Hash that the data must have.")


class EvalDataSettings(DataSettings):
    """Text or images to measure on; the same keys as `data`."""

    split: str = Field("heldout", description="Split of a data set.")
    samples: int = Field(64, ge=1, le=MOST_SAMPLES, description="How many samples are drawn.")


class ExportSettings(Section):
    """What is written."""

    format: Literal["auto", "compressed-tensors", "bitsandbytes", "custom"] = Field(
        "auto", description="auto: the stock format where it can hold every weight, else one modelling file."
    )
    stock_only: bool = Field(False, description="Refuse in plan what stock transformers can't load by itself.")
    shard_bytes: Bytes = Field(4 << 30, description="Largest weight file.")
    card: bool = Field(True, description="Write a model card, README.md.")


class EvalSettings(Section):
    """What is measured before and after, and what must hold."""

    metrics: tuple[Metric, ...] = Field(
        ("perplexity", "kl_divergence", "top1_agreement", "size", "speed", "memory"), description="What to measure."
    )
    data: EvalDataSettings = Field(
        default_factory=lambda: EvalDataSettings(), description="Never the calibration samples: one source is divided."
    )
    batch_size: Count = Field(8, description="Samples per forward pass.")
    gates: dict[str, FiniteFloat] = Field(
        {}, description="NAME: upper bound; NAME_min; NAME_increase_percent; NAME_drop_points."
    )
    confidence: float | None = Field(
        None, gt=0.5, lt=1, description="A gate fails only when this bootstrap interval lies wholly beyond its bound."
    )

    @field_validator("gates")
    @classmethod
    def _known(cls, gates: dict[str, float]) -> dict[str, float]:
        for name in gates:
            if (problem := unknown_gate(name)) is not None:
                raise PydanticCustomError("unknown-gate", problem, {"gate": name})
        return gates

    @model_validator(mode="after")
    def _measured(self) -> EvalSettings:
        for name, metric in unmeasured_gates(self.gates, self.metrics).items():
            raise PydanticCustomError(
                "gate-unmeasured",
                f"gate {name!r} needs {metric} among eval.metrics; measure it or drop the gate",
                {"gate": name, "metric": metric},
            )
        return self


class ReportSettings(Section):
    """Which renderings of report.json are written."""

    html: bool = Field(True, description="report.html, self-contained.")
    markdown: bool = Field(True, description="report.md.")
    junit: bool = Field(True, description="junit.xml with one case per gate.")
    github_summary: Literal["auto", "never"] = Field("auto", description="auto: when $GITHUB_STEP_SUMMARY is set.")


class LimitsSettings(Section):
    """Preflight refuses a run whose plan exceeds one of them."""

    memory: Bytes | None = Field(None, description="null: what is free, less 10 %.")
    disk: Bytes | None = Field(None, description="null: what is free.")


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "export": ExportSettings,
    "eval": EvalSettings,
    "report": ReportSettings,
    "limits": LimitsSettings,
}
