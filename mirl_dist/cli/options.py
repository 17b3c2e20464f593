"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value, read as YAML; may be repeated.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes of each rank; default: one per processor.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TicketArgument = Annotated[str, typer.Argument(help="Run folder, run folder/rounds/NN, or a ticket file.")]
Tile = Annotated[int | None, typer.Option(help="Pixels of square tiles, for images too large for memory.")]
