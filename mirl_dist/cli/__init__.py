"""The commands of `mirl-dist`, gathered in app.py, and the options that several of them share."""

from typing import Annotated

from typer import Argument, Option

Sets = Annotated[list[str] | None, Option("--set", help="key=value, read as YAML; may be repeated.")]
Json = Annotated[bool, Option("--json", help="Print JSON for programs.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace outputs that exist.")]
TicketArgument = Annotated[str, Argument(help="Run folder, run folder/rounds/NN, or a ticket file.")]
