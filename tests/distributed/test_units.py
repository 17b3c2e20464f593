"""What FSDP2 gathers and frees as a unit: whole blocks, and nothing smaller."""

from mirl_dist import models
from mirl_dist.distributed.engines import fsdp


def test_only_whole_blocks_are_units() -> None:
    small = {"dim": 8, "blocks": (1, 2, 1, 1), "refinement_blocks": 1}
    network = models.create("promptir", **small, prompt_dims=(8, 8, 8), prompt_sizes=(4, 4, 4))
    kinds = {type(unit).__name__ for unit in fsdp._units(network)}
    assert kinds == {"TransformerBlock"}
