"""Defines the errors that a user can act on. Each has the finding, its place, the next action and an exit code.

Any other exception is a bug of this project: the command line prints its traceback and ends with code 1. The exit codes
are documented in docs/exit-codes.md. A `Notice` is a warning: the run continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypedDict


class WarningRow(TypedDict):
    """A `Notice` as JSON values."""

    code: str
    where: str
    message: str
    data: dict[str, Any]


class ErrorEvent(TypedDict):
    """A `CompressError` as the `error` event of --json output. code: the exit code; name: its class"""

    event: Literal["error"]
    code: int
    name: str
    message: str
    where: str | None
    hint: str | None
    data: dict[str, Any]


class ErrorMessage(TypedDict):
    """A `CompressError` on its way to another process. classes: its own and its base classes, by name"""

    classes: list[str]
    what: str
    where: str | None
    hint: str | None
    data: dict[str, Any]


@dataclass(frozen=True)
class Notice:
    """A warning.

    code   names its kind: few-tokens
    where  the weight, file, recipe position or setting it is about
    data   the values of the message by name, for programs: {"tokens": 32}. JSON values
    """

    code: str
    where: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> WarningRow:
        return {"code": self.code, "where": self.where, "message": self.message, "data": dict(self.data)}

    @classmethod
    def from_json(cls, row: WarningRow) -> Notice:
        return cls(row["code"], row["where"], row["message"], row["data"])

    def __str__(self) -> str:
        return f"warning[{self.code}]: {self.where}: {self.message}"


class CompressError(Exception):
    """Base class of every error that a user can act on.

    what   the finding, with the actual values
    where  its place: the weight, file, position in the recipe, or setting
    hint   the next action of the user
    data   the values of the message by name, for programs: {"reachable": 0.42}. JSON values. If class and place don't
           identify the error, "reason" does
    """

    exit_code: ClassVar[int] = 1
    code_name: ClassVar[str] = "error"

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, data: Mapping[str, Any] | None = None
    ) -> None:
        self.what, self.where, self.hint, self.data = what, where, hint, dict(data or {})
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        end = "" if not self.hint or self.what.endswith((".", "?", "!")) else "."
        advice = f" {self.hint}" if self.hint else ""
        return f"{place}{self.what}{end}{advice}"

    def event(self) -> ErrorEvent:
        """The `error` event of --json output."""
        return {
            "event": "error",
            "code": self.exit_code,
            "name": self.code_name,
            "message": self.what,
            "where": self.where,
            "hint": self.hint,
            "data": self.data,
        }


class UsageError(CompressError):
    """An option, argument or output directory that can't be used."""

    exit_code, code_name = 2, "usage"


class RecipeError(CompressError):
    """A recipe, or the data it names, that can't be used."""

    exit_code, code_name = 2, "recipe"


class ResumeError(CompressError):
    """A journal that doesn't belong to the requested run."""

    exit_code, code_name = 2, "resume"


class GateError(CompressError):
    """The artifact is valid, but a quality gate of the recipe doesn't hold."""

    exit_code, code_name = 3, "gate-failed"


class ArtifactError(CompressError):
    """An artifact that doesn't load, or gives wrong outputs."""

    exit_code, code_name = 4, "verification-failed"


class ModelError(CompressError):
    """A checkpoint that is missing, damaged, unsafe or not supported."""

    exit_code, code_name = 5, "model"


class ShapeError(CompressError):
    """A weight whose shape doesn't fit the settings."""

    exit_code, code_name = 5, "shape"


class WidthError(ShapeError):
    """A weight whose number of inputs no group size divides. It may stay dense if no pattern names it."""


class PreflightError(CompressError):
    """A run that can't succeed: too little memory or disk, or an order of steps that doesn't work."""

    exit_code, code_name = 5, "preflight"


class DependencyError(CompressError):
    """An optional package is missing. The hint says how to install it."""

    exit_code, code_name = 6, "missing-dependency"


class KernelError(CompressError):
    """A requested kernel can't be used on this machine."""

    exit_code, code_name = 6, "kernel"


class PassError(CompressError):
    """A numerical or data failure inside a pass. The journal is kept."""

    exit_code, code_name = 7, "pass-failed"


class Interrupted(CompressError):
    """Ctrl-C, SIGTERM or SIGHUP. Finished work is kept and can be resumed."""

    exit_code, code_name = 130, "interrupted"


class Because(str):
    """A reason as part of a message, with its values, which are `because` in the data of the error or warning."""

    data: dict[str, Any]

    def __new__(cls, text: str, /, **data: Any) -> Because:
        made = super().__new__(cls, text)
        made.data = data
        return made


def values_of(why: str | None) -> dict[str, Any]:
    """The values of a reason; {} for plain text."""
    return why.data if isinstance(why, Because) else {}


def data_of(problems: Sequence[str]) -> dict[str, Any]:
    """The data of an error with several problems: their sentences, and the values of each."""
    return {"problems": list(problems), "because": [values_of(problem) for problem in problems]}


def error_to_dict(error: CompressError) -> ErrorMessage:
    """JSON values from which `error_from` makes the same error in another process."""
    classes = [cls.__name__ for cls in type(error).__mro__ if issubclass(cls, CompressError)]
    return {"classes": classes, "what": error.what, "where": error.where, "hint": error.hint, "data": error.data}


def error_from(reported: ErrorMessage) -> CompressError:
    """The error of another process. A class that is unknown here is replaced by its nearest known base class."""
    known = {cls.__name__: cls for cls in _with_subclasses(CompressError)}
    cls = next(known[name] for name in reported["classes"] if name in known)
    return cls(reported["what"], where=reported["where"], hint=reported["hint"], data=reported["data"])


def _with_subclasses(cls: type[CompressError]) -> list[type[CompressError]]:
    return [cls, *(found for subclass in cls.__subclasses__() for found in _with_subclasses(subclass))]
