"""Defines the sections of a recipe as frozen pydantic classes: types, defaults and the meaning of each setting.

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
    """Turn 4GiB, 500MB or a number into bytes. Any other value is returned as it is, and the schema refuses it."""
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
    """A data source as it may be published: of an absolute path, or one with "..", only the last part is kept."""
    kind, colon, name = source.partition(":") if source.startswith("dataset:") else ("", "", source)
    path = Path(os.path.expanduser(name))
    return f"{kind}{colon}{path.name}" if path.is_absolute() or ".." in path.parts else source


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """How the model is held in memory while it is compressed."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source", description="Dtype of the weights that stay dense. source: the dtype of the checkpoint."
    )
    placement: Literal["stream", "resident"] = Field(
        "stream", description="stream: free each block when it is finished. resident: keep all blocks in memory."
    )


class DataSettings(Section):
    """Calibration data: text or images, as the model reads them."""

    source: str = Field(
        "stdlib",
        min_length=1,
        description="Source of the data: stdlib, random, the path of a file or of a saved data set, or dataset:NAME.",
    )
    config: str | None = Field(None, description="Configuration of the data set dataset:NAME.")
    split: str = Field("train", description="Split of the data set. stdlib has train and heldout.")
    format: Literal["text", "chat"] = Field(
        "text",
        description="text: documents are texts. chat: documents are lists of messages, which the chat template of the "
        "model's tokenizer turns into tokens.",
    )
    field: str = Field(
        "text",
        description="Column or JSON key with the text or the chat of a document. If it is not set, chats are read "
        "from messages or conversations.",
    )
    samples: int = Field(128, ge=1, le=MOST_SAMPLES, description="Number of samples that are drawn.")
    length: int = Field(
        512,
        ge=2,
        le=MOST,
        description="Tokens per sample. If it is not set: 512, or the model's limit if that is smaller.",
    )
    pack: bool = Field(
        True,
        description="true: join the documents and cut them into samples of `length`; each sample of chats begins with "
        "a chat. false: one document per sample.",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seed that chooses the samples. null: the recipe's seed."
    )
    sha256: str | None = Field(None, pattern=SHA256, description="Hash that the data must have. Other data is refused.")


class EvalDataSettings(DataSettings):
    """Evaluation data, with the same keys as `data`."""

    split: str = Field("heldout", description="Split of the data set. stdlib has train and heldout.")
    samples: int = Field(64, ge=1, le=MOST_SAMPLES, description="Number of samples that are drawn.")


class ExportSettings(Section):
    """How the artifact is written."""

    format: Literal["auto", "compressed-tensors", "bitsandbytes", "custom"] = Field(
        "auto",
        description="Export format. auto: a stock format if it can hold every weight, else custom (a modeling file).",
    )
    stock_only: bool = Field(False, description="Refuse a recipe whose artifact stock transformers can't load.")
    shard_bytes: Bytes = Field(4 << 30, description="Size limit of each weight file, in bytes or as in 4GiB.")
    card: bool = Field(True, description="Write a model card (README.md).")


class EvalSettings(Section):
    """What is measured before and after compression, and which bounds must hold."""

    metrics: tuple[Metric, ...] = Field(
        ("perplexity", "kl_divergence", "top1_agreement", "size", "speed", "memory"),
        description="The metrics to measure.",
    )
    data: EvalDataSettings = Field(
        default_factory=lambda: EvalDataSettings(),
        description="Evaluation data. If it names the same source as `data`, that source is divided.",
    )
    batch_size: Count = Field(8, description="Samples per forward pass.")
    gates: dict[str, FiniteFloat] = Field(
        {},
        description="Bounds that must hold: NAME (upper bound), NAME_min (lower bound), NAME_increase_percent or "
        "NAME_drop_points, each with a number.",
    )
    confidence: float | None = Field(
        None,
        gt=0.5,
        lt=1,
        description="A gate fails only if the whole bootstrap interval of this confidence lies beyond its bound.",
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
    """Which forms of the report are written beside report.json."""

    html: bool = Field(True, description="Write report.html, a page without external files.")
    markdown: bool = Field(True, description="Write report.md.")
    junit: bool = Field(True, description="Write junit.xml with one test case per gate.")
    github_summary: Literal["auto", "never"] = Field(
        "auto", description="auto: write the report to $GITHUB_STEP_SUMMARY if it is set."
    )


class LimitsSettings(Section):
    """Limits of a run. A run whose plan exceeds one of them is refused before it starts."""

    memory: Bytes | None = Field(
        None,
        description="Memory that each process of the run may use, in bytes or as in 16GiB. Models that don't fit are "
        "verified and measured block by block. null: the free memory minus 10 %.",
    )
    disk: Bytes | None = Field(
        None, description="Disk space that the run may use, in bytes or as in 50GiB. null: the free space."
    )


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "export": ExportSettings,
    "eval": EvalSettings,
    "report": ReportSettings,
    "limits": LimitsSettings,
}
