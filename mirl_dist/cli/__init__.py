"""The commands of `mirl-dist`, gathered in app.py, and the options that several of them share."""

from typing import Annotated

import typer

Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value, read as YAML; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TicketArgument = Annotated[str, typer.Argument(help="Run folder, run folder/rounds/NN, or a ticket file.")]
