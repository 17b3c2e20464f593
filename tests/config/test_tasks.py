"""Laws of the task words."""

from __future__ import annotations

import pickle
from typing import get_args

import pytest

from mirl_dist.config import tasks
from mirl_dist.config.tasks import Task
from mirl_dist.data.manifest import Kind
from mirl_dist.errors import UserError


def test_stored_pairs_are_the_kinds_of_the_manifest() -> None:
    assert set(tasks.KINDS) == set(get_args(Kind)) - {tasks.CLEAN}
    for kind in tasks.KINDS:
        assert Task.of(kind) == Task(kind, kind, "pairs", "")


SYNTHETIC = (
    "denoise_1 denoise_255 denoise_mild deblur_easy deblur_k19s4 deblur_k3s1 deblur_k51s20 superres_hard superres_2 "
    "superres_16 dejpeg_mild dejpeg_100 enlighten_hard"
)
UNKNOWN = (
    "clean pairs denoise denoise_ denoise_0 denoise_256 denoise_025 denoise_+25 denoise_2.5 denoise_٣ denoise_² "
    "denoise_easy derain_1 deblur_k4s1 deblur_k53s1 deblur_k19s0 deblur_k19s21 deblur_k019s4 deblur_19 superres_1 "
    "superres_17 dejpeg_0 dejpeg_101 dejpeg_easy enlighten_2 Derain"
)


@pytest.mark.parametrize("name", SYNTHETIC.split())
def test_what_is_made_on_reading_reads_clean_images(name: str) -> None:
    task = Task.of(name)
    assert task == Task(name, "clean", *name.split("_"))
    assert pickle.loads(pickle.dumps(task)) == task


@pytest.mark.parametrize("name", [*UNKNOWN.split(), "", "enlighten_mild ", "enlighten_mild\n"])
def test_an_unknown_word_is_refused_with_all_that_is_allowed(name: str) -> None:
    with pytest.raises(UserError) as caught:
        Task.of(name)
    text = str(caught.value)
    assert name != "denoise_256" or "did you mean" not in text, "a number out of range is answered with the range"
    assert text.startswith(f"found '{name}', where a task is expected; ")
    for word in ("derain", "denoise_<sigma 1..255>", "deblur_k<odd 3..51>s<sigma 1..20>", "superres_<factor 2..16>"):
        assert word in text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("derian", "derain"), ("enlighten_mid", "enlighten_mild"), ("debluur_easy", "deblur_easy"), ("Desnow", "desnow")],
)
def test_a_slip_is_answered_with_the_nearest_word(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"found '{typed}', .*; did you mean '{meant}'[?] Allowed are derain, "):
        Task.of(typed)


def test_every_allowed_word_without_a_number_is_a_task() -> None:
    plain = [word for word in tasks.allowed() if "<" not in word]
    assert len(plain) == len(tasks.KINDS) + sum(len(levels) for levels in tasks.LEVELS.values())
    assert [Task.of(word).name for word in plain] == plain
