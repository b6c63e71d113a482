"""Defines the manifest of an artifact, and checks every field when it is read. Format: docs/format.md.

An artifact may come from an unknown place. So a file name can't lead out of the directory, a class must be a model
class of transformers, and a quantization format must be installed.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

import transformers
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from compressor.errors import ArtifactError
from compressor.model.ledger import Ledger
from compressor.model.model_files import regular_file
from compressor.model.stored_weight import StoredEntry
from compressor.model.weights import ROLES
from compressor.process.utf8 import parse_json
from compressor.storage.file_names import MANIFEST, is_plain

FORMAT_VERSION = 1
MAX_BYTES = 512 << 20  # of a manifest; with 100,000 experts it has about 50 MB
MAX_SIZE = 2**40  # of one dimension, far above that of any weight
BAD_HINT = "Copy the artifact again from where it was written, or build it again."


def _inside(name: str) -> str:
    """A relative path in its normal form, which must stay inside the directory."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == ".":
        raise ValueError("leads out of the directory or is not a plain relative path")
    if not is_plain(name):
        raise ValueError("contains characters that a file name of an artifact can't have")
    return name


def _module_path(name: str) -> str:
    """Names joined by dots, like the paths of a model's modules and parameters."""
    if not re.fullmatch(r"\w+(\.\w+)*", name) or "__" in name:
        raise ValueError("is not a module path")
    return name


def _known_role(role: str) -> str:
    if role not in ROLES:
        raise ValueError(f"is not one of {', '.join(ROLES)}")
    return role


FileName = Annotated[str, Field(max_length=4096), AfterValidator(_inside)]
ModulePath = Annotated[str, Field(max_length=4096), AfterValidator(_module_path)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$", max_length=200)]
Role = Annotated[str, AfterValidator(_known_role)]
Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _FileFacts(_Part):
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _WeightEntry(_Part):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")  # a weight is made of all of it

    form: Identifier
    spec: dict[str, Any]
    name: str
    tensor: str
    parameter: ModulePath
    shape: Annotated[list[Size], Field(max_length=4)]
    role: Role
    transposed: bool = False
    expert: Size | None = None
    rows: Annotated[list[Size], Field(min_length=2, max_length=2)] | None = None
    bias: str | None = None
    facts: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> _WeightEntry:
        if len(self.shape) < 2 and self.role in ("attention", "mlp", "experts", "router", "head", "embedding"):
            raise ValueError(f"shape {self.shape} is not the shape of a matrix")
        if (self.rows is None) != (self.expert is None) or (self.rows is not None and self.rows[0] >= self.rows[1]):
            raise ValueError(f"rows {self.rows} of expert {self.expert} are not a slice of a parameter")
        return self


class _Tool(_Part):
    name: str
    version: str


class _Change(_Part):
    """A step that changed the model itself."""

    step: str = Field(alias="pass")
    rewrites: bool
    keeps_function: bool


class _Source(_Part):
    name: str
    sha256: str
    changes: list[_Change] | None = None
    relative_errors: dict[str, float | None] = {}
    rewritten: dict[ModulePath, float] = {}


class _Account(_Part):
    becomes: Literal["quantized", "split", "merged", "rewritten", "converted", "copied", "left out"]
    how: str
    bytes: Annotated[int, Field(ge=0)]
    tensors: dict[str, Annotated[int, Field(ge=0)]]
    into: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _sums(self) -> _Account:
        if sum(self.tensors.values()) != self.bytes:
            raise ValueError(f"its tensors have {sum(self.tensors.values())} bytes, and {self.bytes} are stated")
        return self


class _Ledger(_Part):
    source_bytes: Annotated[int, Field(ge=0)]
    accounts: list[_Account]

    @model_validator(mode="after")
    def _balances(self) -> _Ledger:
        if (accounted := sum(account.bytes for account in self.accounts)) != self.source_bytes:
            raise ValueError(f"{accounted} of {self.source_bytes} bytes are accounted for")
        return self


class _Manifest(_Part):
    format_version: Literal[1]
    tool: _Tool
    architecture: Identifier
    route: str
    reason: str
    source: _Source
    ledger: _Ledger | None = None
    weights: dict[str, _WeightEntry]
    carried: dict[str, list[str]] = {}
    layers: dict[Identifier, str]
    files: dict[FileName, _FileFacts]

    @model_validator(mode="after")
    def _agrees(self) -> _Manifest:
        for name, entry in self.weights.items():
            if name != entry.name:
                raise ValueError(f"the entry of the weight {name!r} has the name {entry.name!r}")
        if MANIFEST in self.files:
            raise ValueError("the manifest lists itself")
        return self


class FileFacts(TypedDict):
    bytes: int
    sha256: str


class Tool(TypedDict):
    name: str
    version: str


_OfPass = TypedDict("_OfPass", {"pass": str})


class Change(_OfPass):
    """A step that changed the model itself. keeps_function: the model still computes the same, except for rounding"""

    rewrites: bool
    keeps_function: bool


class Source(TypedDict):
    """What the artifact was made from. Earlier releases recorded neither the changes nor the errors.

    relative_errors  of each stored weight after it is dequantized
    rewritten        of each dense parameter with new values
    """

    name: str
    sha256: str
    changes: NotRequired[list[Change]]
    relative_errors: NotRequired[dict[str, float | None]]
    rewritten: NotRequired[dict[str, float]]


class Loadable(TypedDict):
    """The fields of a manifest that a stock loader needs."""

    architecture: str
    route: str
    weights: dict[str, StoredEntry]
    files: dict[str, FileFacts]


class Manifest(Loadable):
    """A manifest's JSON values, as `seal` writes and `read_manifest` checks them (docs/format.md).

    ledger   what becomes of every tensor of the source; earlier releases had none
    carried  tensors that the model doesn't use -> how the stock loader reports them
    layers   quantization format -> the package with its layer
    """

    format_version: int
    tool: Tool
    reason: str
    source: Source
    ledger: NotRequired[Ledger]
    carried: NotRequired[dict[str, list[str]]]
    layers: dict[str, str]


def read_manifest(directory: Path) -> Manifest:
    """The checked manifest. raises ArtifactError if there is none, or this release can't read it"""
    path = directory / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise ArtifactError(
            f"has no {MANIFEST}, so it is not a finished artifact",
            where=str(directory),
            hint="Name the directory that compress-model run wrote; resume a run that was stopped with --resume.",
            data={"reason": "no-manifest", "file": MANIFEST},
        )
    if regular_file(directory, path).stat().st_size > MAX_BYTES:
        raise ArtifactError(
            f"is larger than {MAX_BYTES:,} bytes",
            where=MANIFEST,
            hint=BAD_HINT,
            data={"reason": "too-large", "limit": MAX_BYTES},
        )
    try:
        manifest = parse_json(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"is damaged ({error})", where=MANIFEST, hint=BAD_HINT, data={"reason": "damaged", "cause": str(error)}
        ) from error
    if not isinstance(manifest, dict):
        raise ArtifactError("is not a JSON object", where=MANIFEST, hint=BAD_HINT)
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise ArtifactError(
            f"the artifact has format version {version!r}, and this release reads {FORMAT_VERSION}",
            where=directory.name,
            hint="Install the release of compress-model that wrote it (`tool` in the manifest), or build it again.",
            data={"reason": "version", "version": version, "known": FORMAT_VERSION},
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the manifest"
        value = repr(first["input"])
        shown = f", found {value[:80]}" if not isinstance(first["input"], dict) else ""
        raise ArtifactError(
            f"{place}: {first['msg']}{shown}",
            where=MANIFEST,
            hint=BAD_HINT,
            data={"reason": "invalid", "key": place, "problem": first["msg"]},
        ) from error
    model_class(manifest["architecture"], MANIFEST)
    return cast("Manifest", manifest)


def model_class(name: str, where: str) -> type[transformers.PreTrainedModel]:
    """The model class of transformers that an artifact names. raises ArtifactError for any other name"""
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class is not None):
        raise ArtifactError(
            f"architecture {name!r} is not a model class of transformers {transformers.__version__}",
            where=where,
            hint="Run pip install -U transformers, or build the artifact again with this transformers.",
            data={"reason": "no-class", "architecture": name, "transformers": transformers.__version__},
        )
    return cls
