"""One rank alone: its phases, and its own request to stop."""

from __future__ import annotations

import pytest

from mirl_dist.distributed.ranks import Ranks


def test_phases_nest_and_return_after_an_error() -> None:
    ranks = Ranks(device="cpu")
    assert ranks.phase == "starting"
    with ranks.in_phase("training"):
        with pytest.raises(ZeroDivisionError), ranks.in_phase("committing"):
            assert ranks.phase == "committing"
            raise ZeroDivisionError
        assert ranks.phase == "training"
    assert ranks.phase == "starting"


def test_one_rank_alone_tells_itself_to_stop() -> None:
    ranks = Ranks(device="cpu")
    assert not ranks.stop_requested()
    ranks.request_stop()
    assert ranks.stop_requested()
