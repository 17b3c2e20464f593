"""The commands `mirl-dist shards ...`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from mirl_dist.cli import Sets
from mirl_dist.distributed import environment
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import UserError

Workers = Annotated[int | None, Option(min=1, help="Processes of each rank; default: one per processor.")]
app = typer.Typer(no_args_is_help=True, help="Build and check WebDataset shards.")


@app.command("build")
def shards_build(
    recipe: Annotated[Path, Argument(help="YAML file, for example shards/demo.yaml.")],
    out: Annotated[str, Option(help="Where the shards go: a folder, or s3://bucket/prefix.")],
    workers: Workers = None,
    sets: Sets = None,
) -> None:
    """Turn folders of images into WebDataset shards of whole images and pairs, with a manifest.

    Under `accelerate launch` or torchrun all ranks share the work.
    """
    from mirl_dist.data.building import contact_sheet
    from mirl_dist.data.building.build import build
    from mirl_dist.data.building.recipe import read
    from mirl_dist.data.parallel import SINGLE_PROCESS, WorkerGroup
    from mirl_dist.distributed.hardware import processes
    from mirl_dist.observability import progress
    from mirl_dist.storage import open_store

    StopSignal().listen()  # finished shards are kept; the next build resumes from them
    ranks = None
    environment.check_rank(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from mirl_dist.distributed.ranks import Ranks

        ranks = Ranks(device="cpu")
    group: WorkerGroup = ranks or SINGLE_PROCESS
    # Only rank 0 reads the user's files and settings, because they may differ between nodes.
    recipe_tree, store = group.on_main(lambda: (read(recipe, sets or []), open_store(out)))
    with progress.Bars() as bars:
        report = bars if group.rank == 0 else lambda done, total, what: None
        manifest = build(recipe_tree, store, workers or processes(), report, group)
    skipped = [f"skipped: {text}" for text in manifest.skipped]
    group.on_main(lambda: progress.say("\n".join([*skipped, *contact_sheet.lines(store, manifest)])))
    if ranks is not None:
        ranks.close()


@app.command("check")
def shards_check(
    shards: Annotated[str, Argument(help="Built shards: a folder, s3:// or https://.")],
    workers: Workers = None,
) -> None:
    """Check every shard against its manifest: sizes, digests, counts, and that every image decodes."""
    from mirl_dist.data.building.check import check
    from mirl_dist.distributed.hardware import processes
    from mirl_dist.observability import progress
    from mirl_dist.storage import open_store

    store = open_store(shards)
    with progress.Bars() as bars:
        faults = check(store, workers or processes(), bars)
    if faults:
        raise UserError(f"{len(faults)} faults in {store.where()}:\n" + "\n".join(f"  {fault}" for fault in faults))
    progress.say(f"{store.where()}: whole")
