"""Laws of recipes and of pairing: names only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.data.building import discovery, planning
from mirl_dist.data.building.recipe import Recipe, read
from mirl_dist.errors import UserError
from tests.data import loaders

RECIPES = Path(__file__).resolve().parents[3] / "shards"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def recipe(*train: dict[str, Any], **more: Any) -> Recipe:
    return loaders.recipe({"name": "test", "train": list(train), **more})


def pairs(root: Path, degraded: str = "{id}", clean: str = "{id}", **more: Any) -> dict[str, Any]:
    return {
        "set": "pairs",
        "kind": "derain",
        "degraded": {"folder": str(root / "input"), "names": degraded},
        "clean": {"folder": str(root / "target"), "names": clean},
        **more,
    }


def matched(found: Recipe) -> dict[str, str]:
    pictures, complaints = discovery.find_images(found)
    assert not complaints, complaints
    return {p.name: p.clean.name for p in pictures}


@pytest.mark.parametrize(
    ("names", "stem", "identity"),
    [
        ("{id}", "0001", "0001"),
        ("rain-{id}", "rain-12", "12"),
        ("rain-{id}", "norain-12", None),
        ("{id}_{any}", "1400_6", "1400"),
        ("{id}_{any}", "North_Cape_0-0_003", "North_Cape_0-0"),
        ("{id}_{any}_{any}", "0025_0.8_0.04", "0025"),
        ("{id}_{any}", "1400", None),
        ("a.b[{id}]", "a.b[x]", "x"),
        ("a.b{id}", "axbx", None),
    ],
)
def test_a_template_finds_the_longest_id_or_none(names: str, stem: str, identity: str | None) -> None:
    match = discovery.compile_template(names).fullmatch(stem)
    assert (match and match.group("id")) == identity


def test_one_clean_image_serves_several_degraded_ones_of_another_ending(tmp_path: Path) -> None:
    touch(tmp_path, "input/7_1.png", "input/7_2.PNG", "input/8_1.png", "target/7.jpg", "target/8.bmp")
    found = matched(recipe(pairs(tmp_path, "{id}_{any}")))
    assert found == {"7_1.png": "7.jpg", "7_2.PNG": "7.jpg", "8_1.png": "8.bmp"}


def test_hidden_files_and_other_endings_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "input/1.png", "input/._1.png", "input/Thumbs.db", "input/1.mat", "target/1.png")
    assert matched(recipe(pairs(tmp_path))) == {"1.png": "1.png"}


def test_every_missing_or_ambiguous_partner_is_named_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "input/1.png", "input/2.png", "input/3.png", "target/1.png", "target/3.png", "target/3.jpg")
    touch(tmp_path, "target/9.png")
    pictures, complaints = discovery.find_images(recipe(pairs(tmp_path)))
    assert [p.name for p in pictures] == ["1.png"]
    assert [c.full() for c in complaints] == [
        f"{tmp_path}/input/2.png: no clean partner '2' in {tmp_path}/target",
        f"{tmp_path}/input/3.png: several clean partners, 3.jpg, 3.png, in {tmp_path}/target",
        f"{tmp_path}/target/9.png: no degraded partner of id '9' in {tmp_path}/input",
    ]
    assert not any(str(tmp_path) in c.portable() for c in complaints)
    _, fewer = discovery.find_images(recipe(pairs(tmp_path, unused_clean=True)))
    assert len(fewer) == 2


def test_a_name_that_does_not_fit_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "input/rain-1.png", "input/odd.png", "target/norain-1.png")
    _, complaints = discovery.find_images(recipe(pairs(tmp_path, "rain-{id}", "norain-{id}")))
    assert [c.full() for c in complaints] == [f"{tmp_path}/input/odd.png: its name does not fit 'rain-{{id}}'"]


def test_another_count_than_expected_names_what_was_not_counted_and_the_origin(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "input/1.png", *(f"input/{n}.png" for n in range(2, 7)), "target/1.png", "target/9.png")
    one = pairs(tmp_path, expect=1000, get="https://example.org/rain; research")
    two = {"set": "two", "kind": "clean", "clean": {"folder": str(tmp_path / "nowhere")}, "get": "from Ada"}
    with pytest.raises(UserError) as fault:
        discovery.find_images(recipe(one, two, broken="skip"))
    first, got, second, two_got = str(fault.value).splitlines()
    found = f"found 1 pairs, expected 1,000, in {tmp_path}/input (*) and {tmp_path}/target (*)."
    assert first.startswith(f"the set 'pairs' (train): {found} Not counted: 2.png: no clean partner '2'; 3.png:")
    assert first.endswith("; and 3 more. Complete the set, or correct 'expect' in the recipe.")
    assert got == "  available from: https://example.org/rain; research"
    assert second.startswith(f"the set 'two' (train): no folder at {tmp_path}/nowhere")
    assert two_got == "  available from: from Ada"


def test_all_missing_and_empty_folders_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one = {"set": "one", "kind": "clean", "clean": {"folder": str(tmp_path / "no/where")}}
    two = {"set": "two", "kind": "clean", "clean": {"folder": str(tmp_path / "empty")}}
    with pytest.raises(UserError) as fault:
        discovery.find_images(recipe(one, two))
    assert f"no folder at {tmp_path}/no/where (the nearest that exists is {tmp_path})" in str(fault.value)
    assert f"no image in {tmp_path}/empty fits '*'" in str(fault.value)


def test_an_unset_variable_is_named_with_the_way_to_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIRL_SETS", raising=False)
    with pytest.raises(UserError, match=r"MIRL_SETS is not set.*export MIRL_SETS=/path/to/the/images"):
        discovery.find_images(read(RECIPES / "wed.yaml"))


def test_a_share_does_not_depend_on_the_other_names(tmp_path: Path) -> None:
    """Whoever is chosen among many stays chosen among fewer."""
    touch(tmp_path, *(f"input/{n}.png" for n in range(40)))
    one = {"set": "s", "kind": "clean", "clean": {"folder": str(tmp_path / "input")}}
    few = [p.name for p in discovery.find_images(recipe({**one, "limit": 5}))[0]]
    half = [p.name for p in discovery.find_images(recipe({**one, "fraction": 0.5}))[0]]
    other = [p.name for p in discovery.find_images(recipe({**one, "limit": 5}, seed=1))[0]]
    assert len(few) == 5 and len(half) == 20
    assert set(few) < set(half) and few != other and few == sorted(few)
    own = [p.name for p in discovery.find_images(recipe({**one, "limit": 5, "draw_seed": 1}, seed=7))[0]]
    assert own == other, "a draw's own seed stands for the recipe's"


@pytest.mark.parametrize(
    ("fraction", "count", "kept"),
    [(0.05, 4744, 237), (0.05, 400, 20), (0.05, 5144, 257), (0.1, 200, 20), (0.03, 72135, 2164)]
    + [(0.5, 3, 2), (0.5, 5, 3), (0.15, 10, 2), (0.29, 50, 15), (0.001, 10, 1)],
)
def test_a_fraction_keeps_the_nearest_number_as_the_paper_counts_it(fraction: float, count: int, kept: int) -> None:
    """The first five are MIR-L's: 237 + 20 of WED and BSD400, 20 of Rain100L, 2,164 of OTS. Halves go up."""
    assert discovery.count_kept(fraction, count) == kept


def test_all_contradictions_of_a_recipe_are_told_at_once() -> None:
    folder = {"folder": "x", "names": "{any}"}
    with pytest.raises(UserError) as fault:
        recipe(
            {"set": "a", "kind": "clean", "clean": {"folder": "x"}, "make": "rain"},
            {"set": "b", "kind": "derain", "clean": {"folder": "x"}},
            {
                "set": "B",
                "kind": "dehaze",
                "photographs": ["coffee"],
                "make": "rain",
                "limit": 1,
                "fraction": 0.5,
            },
            {"set": "c", "kind": "derain", "clean": folder, "degraded": {"folder": "x", "include": ["../*"]}},
            {"set": "d", "kind": "clean"},
            {"set": "e", "kind": "clean", "clean": {"folder": "x"}, "draw_seed": 3},
            {"set": "f", "kind": "deblur", "photographs": ["coffee"], "make": "snow"},
            {"set": "g", "kind": "clean", "photographs": ["coffee"], "versions": 2},
        )
    for text in (
        "the set 'a' is of kind clean, which the reader degrades; remove 'degraded' and 'make'",
        "the set 'b' is of kind derain and has 'degraded' and 'make' both or neither",
        "the set 'B' makes rain, which is of kind derain, not dehaze",
        "the set 'B' has 'limit' and 'fraction'",
        "found two sets named 'B'",
        "the set 'c' has clean.names '{any}'; it must hold {id} exactly once",
        "the set 'c' has degraded.include ['../*']; globs lie below the folder",
        "the set 'd' has 'clean' and 'photographs' both or neither",
        "the set 'e' has 'draw_seed', but keeps all it finds",
        "the set 'f' makes snow, which is of kind desnow, not deblur",
        "the set 'g' has versions: 2 without 'make', which alone makes versions; remove one",
    ):
        assert text in str(fault.value)


def test_an_unknown_key_or_photograph_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="nearest key is 'photographs'"):
        recipe({"set": "a", "kind": "clean", "photograph": ["coffee"]})
    with pytest.raises(UserError, match="no photograph is named 'tea'. Known are: astronaut, chelsea"):
        discovery.find_images(recipe({"set": "a", "kind": "clean", "photographs": ["tea"]}))


def test_folders_are_no_part_of_a_recipes_content() -> None:
    here, there = ({"set": "a", "kind": "clean", "clean": {"folder": f}} for f in ("here", "there"))
    assert recipe(here).content() == recipe(there).content()
    assert recipe(here).content() != recipe({**here, "limit": 3}).content()
    assert recipe(here).content() == recipe({**here, "expect": 3, "get": "anywhere"}).content()


def test_keys_are_short_plain_and_differ_where_names_differ() -> None:
    names = [
        "a.b.png",
        "a-b.png",
        "a/b.png",
        "ä.png",
        "x" * 200 + "1.png",
        "x" * 200 + "2.png",
        "bad\udcff.png",
    ]
    keys = set()
    for name in names:
        picture = discovery.SourceImage("evaluate", "s" * 24, "derain", name, Path(name))
        keys.add(planning.sample_key(picture))
    assert len(keys) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,69}", key) for key in keys)
