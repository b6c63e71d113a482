"""Arguments and options that several commands have, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.render import (
    Format,
)

RecipeArg = Annotated[str, typer.Argument(help="Recipe file, or the name of a bundled recipe.", show_default=False)]
ModelOpt = Annotated[
    str,
    typer.Option(
        "--model", help="Checkpoint directory, name of a model in the local hub cache, or demo.", show_default=False
    ),
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, for example steps.0.bits=3.")
]
DeviceOpt = Annotated[str, typer.Option(help="Device for the work: auto, cpu, cuda or cuda:N.")]
ThreadsOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="Number of CPU threads. Results are reproducible only for the same number.",
        show_default=False,
    ),
]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run of this --output.")]
FreshOpt = Annotated[
    bool, typer.Option("--fresh", help="Delete what an earlier run wrote to this --output, and begin again.")
]
NoEvalOpt = Annotated[bool, typer.Option("--no-eval", help="Skip the evaluation. The recipe must have no gates.")]
LongOpt = Annotated[bool, typer.Option("--long", help="Allow a run that is predicted to take more than a day.")]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code that is bundled with the checkpoint to run.")
]
QuietOpt = Annotated[bool, typer.Option("--quiet", help="Print only warnings and errors.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON event per line on standard output.")]
FormatOpt = Annotated[Format, typer.Option("--format", help="Choose the output format.")]
DirArg = Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)]
