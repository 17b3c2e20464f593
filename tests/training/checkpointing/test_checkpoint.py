"""Laws of commits: whole or none, the newest whole one wins, and what is damaged is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.storage import Folder, Rejected, Unavailable
from mirl_dist.storage.commits import COMPLETE, Commits, Reader, check_digest, part_info
from mirl_dist.training.checkpointing.checkpoint import (
    BEST,
    INITIAL,
    MASK,
    MOMENTS,
    PICTURES,
    RUN,
    SCORES,
    STATE,
    TICKET,
    TRACKING,
    WEIGHTS,
    Checkpoints,
)
from mirl_dist.training.progress import Progress
from mirl_dist.training.state import pack_tensors, unpack_masks
from mirl_dist.training.ticket import metrics, parse, validation_score
from tests.storage.snapshots import SHAPES, commit_round, commit_steps, masks, progress, snapshot, ticket, weights

STEP_PARTS = (WEIGHTS, MOMENTS, MASK, STATE)
ROUND_PARTS = (WEIGHTS, MASK, STATE, TICKET, SCORES, PICTURES)


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Folder(tmp_path))


def spoil(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def newest(kept: Checkpoints) -> tuple[int, int | None, list[str]]:
    found = kept.latest()
    assert found is not None
    commit, parts, damaged = found
    assert json.loads(parts[STATE])["round"] == commit.round_
    return commit.round_, commit.step, damaged


def places(kept: Checkpoints) -> list[tuple[int, int | None]]:
    return [(commit.round_, commit.step) for commit in kept.commits()]


# -- whole or none ----------------------------------------------------------------------------------------------


def test_without_commits_there_is_none(kept: Checkpoints) -> None:
    assert kept.latest() is None
    assert kept.commits() == []
    assert kept.tickets() == []
    with pytest.raises(UserError, match=r"rounds/00 holds no finished round"):
        kept.ticket(0)


def test_what_is_committed_comes_back_to_the_last_bit(kept: Checkpoints) -> None:
    commit_steps(kept, 3)
    found = kept.latest()
    assert found is not None
    commit, parts, damaged = found
    assert (commit.folder, commit.round_, commit.step, damaged) == ("rounds/00/steps/00000003-0000", 0, 3, [])
    assert set(parts) == set(STEP_PARTS)
    again = safetensors.torch.load(parts[WEIGHTS])
    assert all(torch.equal(again[n], w) for n, w in weights(3).items())
    assert Progress.model_validate_json(parts[STATE]) == progress(0, 3)
    assert masking.digest(unpack_masks(parts[MASK], SHAPES, "here")) == masking.digest(masks())
    commit_round(kept, 0)
    assert kept.commits()[0].folder == "rounds/00/ticket-0000"
    again = kept.round_weights(0)
    assert all(torch.equal(again[n], w) for n, w in weights(0).items())
    assert (kept.ticket(0), kept.scores(0), kept.pictures(0)) == (ticket(0), b"csv", b"png")
    said = check_digest(kept.store.get(f"rounds/00/ticket-0000/{COMPLETE}"))
    assert said == {"parts": {name: part_info(kept.store.get(f"rounds/00/ticket-0000/{name}")) for name in ROUND_PARTS}}
    kept.commit_round(ticket(1), snapshot(1, 4, 0), b"csv", None, 2)
    assert (kept.pictures(1), newest(kept)) == (None, (1, None, []))


def test_a_commit_twice_is_once(tmp_path: Path) -> None:
    once, twice = Checkpoints(Folder(tmp_path / "once")), Checkpoints(Folder(tmp_path / "twice"))
    for kept in (once, twice, twice):
        kept.commit_step(snapshot(0, 3, 3), 2, b"waits")
    for kept in (once, twice, twice):
        commit_round(kept, 0)
    files = [{name: kept.store.get(name) for name in kept.store.list("")} for kept in (once, twice)]
    assert files[0] == files[1]


def test_a_commit_without_complete_does_not_exist(kept: Checkpoints, tmp_path: Path) -> None:
    commit_steps(kept, 3, 6)
    (tmp_path / "rounds/00/steps/00000006-0000" / COMPLETE).unlink()
    assert newest(kept) == (0, 3, []), "nothing damaged: it never was"
    commit_round(kept, 1)
    (tmp_path / "rounds/01/ticket-0000" / COMPLETE).unlink()
    assert kept.tickets() == []


# -- which one wins ---------------------------------------------------------------------------------------------


def test_the_newest_is_the_latest_round_then_its_end_then_its_latest_step(kept: Checkpoints) -> None:
    commit_steps(kept, 3, 12)
    assert newest(kept) == (0, 12, [])
    commit_round(kept, 0)
    assert newest(kept) == (0, None, [])
    commit_steps(kept, 3, round_=1)
    assert newest(kept) == (1, 3, [])
    for round_ in range(1, 11):
        commit_round(kept, round_)
    assert newest(kept) == (10, None, [])
    assert [t.round for t in kept.tickets()] == list(range(11))


def test_a_round_that_ended_wins_over_its_middle_when_tidying_broke_off(tmp_path: Path) -> None:
    class Breaking(Folder):
        def remove(self, name: str) -> None:
            raise Unavailable("the disk is gone")

    kept = Checkpoints(Breaking(tmp_path))
    commit_steps(kept, 3, 12)
    with pytest.raises(Unavailable):
        commit_round(kept, 0)
    assert {c.step for c in kept.commits()} == {3, 12, None}
    assert newest(kept) == (0, None, [])
    assert kept.tickets() == [ticket(0)]


def test_other_files_among_the_rounds_are_no_commits(kept: Checkpoints) -> None:
    commit_steps(kept, 3)
    for folder in ("00_old", "", "00/notes/1", "00/ticket", "00/ticket-", "00/ticket-0000/1", "00/steps/00000009"):
        kept.store.put(f"rounds/{folder}/{COMPLETE}".replace("//", "/"), b"{}")
    kept.store.put("rounds/x", b"{}")
    assert [c.folder for c in kept.commits()] == ["rounds/00/steps/00000003-0000"]


@pytest.mark.parametrize("part", [*STEP_PARTS, COMPLETE])
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    kept: Checkpoints, tmp_path: Path, part: str, how: str
) -> None:
    commit_steps(kept, 3, 6)
    path = tmp_path / "rounds/00/steps/00000006-0000" / part
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7] if how == "cut" else b"")
    round_, step, damaged = newest(kept)
    assert (round_, step) == (0, 3)
    if (part, how) == (COMPLETE, "missing"):
        assert damaged == []
        return
    said = "is missing from its commit" if how == "missing" else "is damaged: "
    assert [text.startswith(f"{path} {said}") for text in damaged] == [True]


def test_when_no_commit_can_be_read_the_run_is_not_begun_afresh(kept: Checkpoints, tmp_path: Path) -> None:
    commit_steps(kept, 3, 6)
    for step in ("00000003-0000", "00000006-0000"):
        spoil(tmp_path / "rounds/00/steps" / step / WEIGHTS)
    damage = r".*0000000{}-0000/weights\.safetensors is damaged"
    both = f"{damage.format(6)}{damage.format(3)}"
    with pytest.raises(
        UserError, match=rf"^no commit of this run can be read: {both}.*\. Restore a copy of the run\.$"
    ):
        kept.latest()


@pytest.mark.parametrize("error", [Rejected, Unavailable])
def test_a_store_that_refuses_is_not_a_damaged_commit(tmp_path: Path, error: type[UserError]) -> None:
    class Refusing(Folder):
        def get(self, name: str) -> bytes:
            if name.endswith(WEIGHTS):
                raise error("the store says no")
            return super().get(name)

    kept = Checkpoints(Refusing(tmp_path))
    commit_steps(kept, 3, 6)
    with pytest.raises(error, match="the store says no"):
        kept.latest()


# -- what is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [2, 3])
def test_only_the_last_commits_are_kept(kept: Checkpoints, keep_last: int) -> None:
    commit_steps(kept, 1, 2, 3, 4, 5, keep_last=keep_last)
    assert [c.step for c in kept.commits()] == [5, 4, 3][:keep_last]
    names = {n.split("/")[3] for n in kept.store.list("rounds/00/steps")}
    assert names == {f"{c.step:08d}-0000" for c in kept.commits()}


def test_rounds_count_among_the_commits_that_are_kept_and_are_never_removed(kept: Checkpoints) -> None:
    commit_steps(kept, 1, 2, keep_last=3)
    commit_round(kept, 0)
    assert places(kept) == [(0, None), (0, 2)]
    commit_steps(kept, 1, round_=1)
    assert places(kept) == [(1, 1), (0, None)]
    commit_steps(kept, 2, 3, round_=1)
    assert places(kept) == [(1, 3), (1, 2), (0, None)]
    for round_ in (1, 2, 3):
        commit_round(kept, round_)
    assert places(kept) == [(3, None), (2, None), (1, None), (0, None)]


def test_a_commit_that_was_found_damaged_does_not_count_among_those_that_are_kept(
    kept: Checkpoints, tmp_path: Path
) -> None:
    commit_steps(kept, 1, 2)
    spoil(tmp_path / "rounds/00/steps/00000002-0000" / WEIGHTS)
    assert newest(kept)[:2] == (0, 1)
    commit_steps(kept, 3)
    assert [c.step for c in kept.commits()] == [3, 1], "the damaged one has gone, the sound one before it has not"


def test_the_end_of_the_run_leaves_its_rounds_alone(kept: Checkpoints) -> None:
    commit_steps(kept, 1, 2)
    commit_round(kept, 0)
    assert places(kept) == [(0, None), (0, 2)]
    kept.finish()
    assert places(kept) == [(0, None)]
    assert set(kept.store.list("rounds")) == {f"rounds/00/ticket-0000/{name}" for name in (*ROUND_PARTS, COMPLETE)}
    assert kept.ticket(0) == ticket(0)


def test_dropped_weights_leave_a_ticket_that_can_be_read(kept: Checkpoints, tmp_path: Path) -> None:
    commit_round(kept, 0)
    commit_round(kept, 1)
    kept.drop_weights(0)
    kept.drop_weights(0)
    assert not (tmp_path / "rounds/00/ticket-0000" / WEIGHTS).exists()
    assert [kept.has_weights(r) for r in (0, 1)] == [False, True]
    said = check_digest(kept.store.get(f"rounds/00/ticket-0000/{COMPLETE}"))
    assert said is not None and said["parts"].keys() == set(ROUND_PARTS) - {WEIGHTS}
    assert [t.round for t in kept.tickets()] == [0, 1]
    assert all(torch.equal(w, weights(1)[n]) for n, w in kept.round_weights(1).items())
    with pytest.raises(UserError, match=r"rounds/00/ticket-0000 kept its ticket but not its weights \(keep\.rounds"):
        kept.round_weights(0)
    with pytest.raises(UserError, match=r"rounds/07 holds no finished round\. `mirl-dist tickets list` shows them"):
        kept.round_weights(7)
    assert newest(kept) == (1, None, [])


@pytest.mark.parametrize("part", [WEIGHTS, MASK, STATE])
def test_a_commit_without_all_that_a_run_needs_is_not_where_it_goes_on(kept: Checkpoints, part: str) -> None:
    commit_round(kept, 0)
    commit_round(kept, 1)
    Commits(kept.store, Reader()).drop("rounds/01/ticket-0000", part)
    text = f"{kept.store.where('rounds/01/ticket-0000')} does not hold all of a run's state (any more)"
    assert newest(kept) == (0, None, [text])


def test_damaged_weights_of_a_round_are_refused(kept: Checkpoints, tmp_path: Path) -> None:
    commit_round(kept, 0)
    spoil(tmp_path / "rounds/00/ticket-0000" / WEIGHTS)
    with pytest.raises(UserError, match=r"rounds/00/ticket-0000/weights\.safetensors is damaged"):
        kept.round_weights(0)


def test_the_best_round_is_remembered_and_every_flipped_byte_found(kept: Checkpoints, tmp_path: Path) -> None:
    assert kept.best() is None
    kept.mark_best(3, 30.5, ("psnr/*/valid",))
    assert kept.best() == 3
    for at in range((tmp_path / BEST).stat().st_size):
        spoil(tmp_path / BEST, at)
        with pytest.raises(UserError, match=r"best\.json is damaged\. Remove it: the last round then represents the"):
            kept.best()
        spoil(tmp_path / BEST, at)


def test_ids_are_remembered_beside_older_ones(kept: Checkpoints) -> None:
    assert kept.mlflow_ids() == {}
    kept.save_mlflow_ids({"run": "1"})
    kept.save_mlflow_ids({"round-0": "2"})
    assert kept.mlflow_ids() == {"run": "1", "round-0": "2"}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"run": 1}', b"\xff\xfe"])
def test_ids_in_a_damaged_file_are_not_known_and_can_be_remembered_anew(kept: Checkpoints, data: bytes) -> None:
    kept.store.put(TRACKING, data)
    assert kept.mlflow_ids() == {}
    kept.save_mlflow_ids({"run": "1"})
    assert kept.mlflow_ids() == {"run": "1"}


# -- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"a.weight": (3, 3)}, "masks and prunable tensors differ: b.weight"),
        (SHAPES | {"c.weight": (1,)}, "masks and prunable tensors differ: c.weight"),
        ({"a.weight": (5, 5), "b.weight": (5,)}, "the mask of 'a.weight' has 2 bytes for 25 weights"),
    ],
)
def test_masks_of_another_network_or_scope_are_refused(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(UserError) as caught:
        unpack_masks(pack_tensors(masking.pack(masks())), shapes, "rounds/00")
    assert str(caught.value) == f"rounds/00/{MASK}: {said}. The prune.scope or the model differs."
    with pytest.raises(UserError, match=r"^rounds/00/mask\.safetensors: "):
        unpack_masks(b"not safetensors at all", SHAPES, "rounds/00")


# -- the run ----------------------------------------------------------------------------------------------------


def test_a_run_is_described_once(kept: Checkpoints) -> None:
    assert kept.identity() is None
    one = {"config": {}, "fingerprint": "one", "manifest_digest": "m", "initial_digest": "i"}
    kept.begin(one)
    with pytest.raises(UserError, match=r"was started by another launch a moment ago\. Choose another run\.folder\."):
        kept.begin(one | {"fingerprint": "two"})
    assert kept.identity() == one


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_run_json_that_describes_no_run_is_refused_and_never_begun_over(kept: Checkpoints, data: bytes) -> None:
    kept.store.put(RUN, data)
    with pytest.raises(UserError, match=r"run\.json does not describe a run, or is damaged\. Restore a copy"):
        kept.identity()


def test_first_weights_come_back_and_missing_or_damaged_ones_are_none_or_others(
    kept: Checkpoints, tmp_path: Path
) -> None:
    assert kept.tensors(INITIAL) is None
    kept.save_tensors(INITIAL, dict(reversed(weights().items())))
    path, data = tmp_path / INITIAL, pack_tensors(weights())
    assert path.read_bytes() == data, "equal tensors give equal bytes"
    found = kept.tensors(INITIAL)
    assert found is not None and masking.digest_tensors(found) == masking.digest_tensors(weights())
    for at in range(len(data)):
        path.write_bytes(data)
        spoil(path, at)
        found = kept.tensors(INITIAL)
        assert found is None or masking.digest_tensors(found) != masking.digest_tensors(weights()), f"byte {at}"
    path.write_bytes(data[:-7])
    assert kept.tensors(INITIAL) is None


# -- tickets ----------------------------------------------------------------------------------------------------


def test_the_digest_tells_the_experiment_and_not_its_circumstances() -> None:
    for same in ({"seconds": 9.0}, {"world": 8}, {"versions": {"torch": "3"}}):
        assert ticket(**same).digest() == ticket().digest()
    others: list[dict[str, Any]] = [{"round_": 1}, {"alive": 9}, {"threshold": 0.25}, {"parent": "p"}, {"samples": 33}]
    others += [{"weights_digest": "v"}, {"fingerprint": "g"}, {"scores": {}}, {"layer_density": {"a.weight": 0.25}}]
    assert len({ticket(**more).digest() for more in [{}, *others]}) == 1 + len(others)


def test_a_ticket_comes_back_from_its_file_and_a_changed_one_is_refused() -> None:
    data = ticket(3).dump()
    assert parse(data, "here") == ticket(3)
    without = {key: value for key, value in json.loads(data).items() if key != "digest"}
    for changed in (data.replace(b'"alive": 10', b'"alive": 11'), json.dumps(without).encode()):
        with pytest.raises(
            UserError, match=r"^here: its content does not have the digest it states\. Take it from the"
        ):
            parse(changed, "here")


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{}", b"\xff", ticket().dump().replace(b'"alive"', b'"aliwe"')])
def test_a_file_that_is_no_ticket_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^here is not a ticket \(.*\)\. Take it from a run folder\.$"):
        parse(data, "here")


def test_densities_are_over_the_prunable_and_over_all() -> None:
    assert (ticket().density, ticket().sparsity) == (10 / 14, 1 - 10 / 14)
    assert (ticket().alive_total, ticket().total_sparsity) == (20 - 14 + 10, 1 - 16 / 20)


def test_scores_become_flat_numbers_and_validation_is_the_mean_of_those_named() -> None:
    found = metrics(ticket())
    assert [found[name] for name in ("psnr/derain/r", "psnr/mean", "weights/density/a.weight")] == [30.0, 29.0, 0.5]
    assert validation_score(ticket(), ("psnr/*/c",)) == 28.0
    assert validation_score(ticket(), ("psnr/*",)) == 29.0
    with pytest.raises(UserError) as caught:
        validation_score(ticket(), ("psnr/mean",))
    assert str(caught.value) == (
        "keep.by: psnr/mean names no score; there are psnr/denoise_25/c, psnr/derain/r, ssim/denoise_25/c, "
        "ssim/derain/r. Correct keep.by."
    )
