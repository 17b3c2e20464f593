"""Laws of checking shards and of reading their manifest and indices: what is wrong has a name, and nothing escapes."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirl_dist.data.building.check import check
from mirl_dist.data.manifest import Manifest, Shard, read_index, read_manifest
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, Rejected, Unavailable
from tests.data.loaders import flip, indices, made, photo, quiet

SHA = "0" * 64


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Four shards: six clean crops of a photograph in one, four rainy ones in two, two to score on."""
    top = tmp_path_factory.mktemp("built")
    coffee = photo("coffee")
    for name, count, left in (("clean", 6, 0), ("rain", 4, 100), ("score", 2, 200)):
        (top / name).mkdir()
        for n in range(count):
            Image.fromarray(coffee[n * 64 : n * 64 + 64, left : left + 80]).save(top / name / f"{n}.png")
    one, two, three = ({"folder": str(top / name)} for name in ("clean", "rain", "score"))
    tree = {
        "name": "small",
        "shard_megabytes": 0.1,
        "train": [
            {"set": "clean", "kind": "clean", "clean": one},
            {"set": "rain", "kind": "derain", "clean": two, "make": "rain"},
        ],
        "evaluate": [{"set": "clean", "kind": "clean", "clean": three}],
    }
    manifest = made(tree, top / "out")
    assert [s.samples for s in manifest.shards] == [6, 2, 2, 2]
    return top / "out", manifest


@pytest.fixture
def copy(built: tuple[Path, Manifest], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "copy"))


def resealed(out: Path, shard: Shard, tar: bytes | None = None, index: bytes | None = None, **more: Any) -> None:
    """Put another tar or index in place of a shard's and make the manifest vouch for it, as a forger would."""
    raw = json.loads((out / "manifest.json").read_bytes())
    (record,) = (s for s in raw["shards"] if s["name"] == shard.name)
    if tar is not None:
        (out / shard.name).write_bytes(tar)
        record |= {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
    if index is not None:
        (out / shard.index_name).write_bytes(index)
        record["index_sha256"] = hashlib.sha256(index).hexdigest()
    record |= more
    (out / "manifest.json").write_text(json.dumps(raw))


class Remote:
    """Reads like a web store: no listing, and each transfer of a shard breaks once after some bytes."""

    def __init__(self, root: Path) -> None:
        self._there = Folder(root)
        self.broken: set[str] = set()

    def where(self, name: str = "") -> str:
        return f"https://example.org/{name}"

    def get(self, name: str) -> bytes:
        return self._there.get(name)

    def size(self, name: str) -> int:
        return self._there.size(name)

    def list(self, prefix: str) -> list[str]:
        raise Rejected("no listing here")

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        data = b"".join(self._there.read(name, offset))
        yield data[: len(data) // 2]
        if name not in self.broken:
            self.broken.add(name)
            raise Unavailable("broken once")
        yield data[len(data) // 2 :]


def test_whole_shards_check_clean_by_any_number_of_workers(built: tuple[Path, Manifest]) -> None:
    assert check(Folder(built[0]), 1, quiet) == check(Folder(built[0]), 2, quiet) == []


def test_shards_elsewhere_are_brought_one_by_one_and_leave_nothing_behind(
    built: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    there = Remote(built[0])
    assert check(there, 1, quiet) == []  # type: ignore[arg-type]
    assert len(there.broken) == len(built[1].shards) and list(tmp_path.iterdir()) == []


def test_damage_elsewhere_is_named_too(copy: Path, built: tuple[Path, Manifest]) -> None:
    (copy / built[1].shards[1].name).unlink()
    (copy / built[1].shards[2].name).write_bytes(b"short")
    faults = check(Remote(copy), 1, quiet)  # type: ignore[arg-type]
    assert f"{copy}/{built[1].shards[1].name} does not exist" in faults[0]
    assert f"{built[1].shards[2].name}: has 5 bytes, the manifest says" in faults[1]


def test_the_damaged_sample_is_named(copy: Path, built: tuple[Path, Manifest]) -> None:
    shard = built[1].shards[0]
    entry = indices(*built)[shard.name].entries[3]
    flip(copy / shard.name, entry.parts["clean.ppm"].offset + 900)
    assert check(Folder(copy), 1, quiet) == [
        f"{shard.name}: its SHA-256 is not the manifest's, although its size is",
        f"{shard.name}: {entry.key}.clean.ppm is damaged (its SHA-256 is not the index's)",
    ]


def test_what_is_missing_cut_foreign_or_exchanged_is_named(copy: Path, built: tuple[Path, Manifest]) -> None:
    shards = built[1].shards
    (copy / shards[0].name).unlink()
    (copy / shards[1].name).write_bytes((copy / shards[1].name).read_bytes()[:-25000])
    (copy / shards[2].index_name).write_bytes((copy / shards[3].index_name).read_bytes())
    (copy / "other.tar").write_bytes(b"")
    faults = "\n".join(check(Folder(copy), 1, quiet))
    assert f"{copy}/{shards[0].name} does not exist" in faults
    assert f"{shards[1].name}: has {shards[1].bytes - 25000} bytes, the manifest says {shards[1].bytes}" in faults
    assert f"{shards[2].index_name} has SHA-256" in faults
    assert "other.tar: exists, but the manifest does not list it" in faults


def test_a_damaged_tar_header_hides_no_sample(copy: Path, built: tuple[Path, Manifest]) -> None:
    shard = built[1].shards[0]
    data = bytearray((copy / shard.name).read_bytes())
    data[:512] = b"\xff" * 512
    (copy / shard.name).write_bytes(data)
    with pytest.raises(tarfile.TarError):
        tarfile.open(copy / shard.name, "r:").close()
    faults = check(Folder(copy), 1, quiet)
    assert any("cannot be read as a tar" in fault for fault in faults)
    assert not any("is damaged" in fault for fault in faults), "every sample is still reachable by the index"


def test_a_place_without_a_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no manifest at {tmp_path}/manifest.json: shards without it do not exist"):
        check(Folder(tmp_path), 1, quiet)


def evil(name: str, **more: Any) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        for key, value in more.items():
            setattr(member, key, value)
        tar.addfile(member, io.BytesIO(b"" if not member.isreg() else b"x" * member.size))

    return add


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (evil("../../etc/cron.d/x.json", size=1), "holds '../../etc/cron.d/x.json', which is no name of a member"),
        (evil("/etc/x.json", size=1), "holds '/etc/x.json', which is no name of a member"),
        (evil("a/b.json", size=1), "holds 'a/b.json', which is no name of a member"),
        (evil("a\\b.json", size=1), "which is no name of a member"),
        (evil("..json", size=1), "holds '..json', which is no name of a member"),
        (evil("a.exe", size=1), "holds 'a.exe', which is no name of a member"),
        (evil("ä.json", size=1), "which is no name of a member"),
        (evil("a.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "holds 'a.json', which is a link"),
        (evil("a.json", type=tarfile.LNKTYPE, linkname="b.json"), "holds 'a.json', which is a link"),
        *(
            (evil("a.json", type=kind), "holds 'a.json', which is a link, a folder or a device")
            for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        ),
        (evil("a.json", size=1), "holds 'a.json', the index does not name it"),
    ],
)
def test_members_that_could_do_harm_when_unpacked_are_refused_by_name(
    add: Callable[[tarfile.TarFile], None], said: str, copy: Path, built: tuple[Path, Manifest]
) -> None:
    shard = built[1].shards[0]
    with tarfile.open(copy / shard.name, "a") as tar:
        add(tar)
    resealed(copy, shard, tar=(copy / shard.name).read_bytes())
    (fault,) = [f for f in check(Folder(copy), 1, quiet) if said in f]
    assert fault.startswith(f"{shard.name}: the tar holds")
    assert not (copy / shard.name).is_symlink()


def test_a_member_that_stands_twice_is_named(copy: Path, built: tuple[Path, Manifest]) -> None:
    shard = built[1].shards[0]
    name = f"{indices(*built)[shard.name].entries[0].key}.json"
    with tarfile.open(copy / shard.name, "a") as tar:
        evil(name, size=1)(tar)
    resealed(copy, shard, tar=(copy / shard.name).read_bytes())
    assert f"{shard.name}: the tar holds {name} twice" in check(Folder(copy), 1, quiet)


def test_a_key_in_two_shards_is_named(copy: Path, built: tuple[Path, Manifest]) -> None:
    """A shard stands in the manifest a second time under another name."""
    shard, twin = built[1].shards[2], "train-rain-00009.tar"
    raw = json.loads((copy / "manifest.json").read_bytes())
    raw["shards"].append({**raw["shards"][2], "name": twin})
    (copy / "manifest.json").write_text(json.dumps(raw))
    shutil.copy(copy / shard.name, copy / twin)
    shutil.copy(copy / shard.index_name, copy / "train-rain-00009.index.json")
    keys = [e.key for e in indices(*built)[shard.name].entries]
    assert check(Folder(copy), 1, quiet) == [f"{twin}: the key {key} stands in {shard.name} too" for key in keys]


def entry(**more: Any) -> dict[str, Any]:
    part = {"offset": 512, "size": 13 + 64 * 80 * 3, "sha256": SHA}
    return {
        "key": "a",
        "height": 64,
        "width": 80,
        "parts": {"clean.ppm": part, "json": {"offset": 20000, "size": 10, "sha256": SHA}},
        **more,
    }


def parts(**more: Any) -> dict[str, Any]:
    """An entry's parts with the clean image's place changed."""
    return {"parts": {**entry()["parts"], "clean.ppm": {**entry()["parts"]["clean.ppm"], **more}}}


def shard_of(data: bytes, **more: Any) -> Shard:
    known = {
        "name": "train-s-00000.tar",
        "role": "train",
        "set": "s",
        "kind": "clean",
        "samples": 1,
        "least_pixels": 64,
        "bytes": 40960,
        "sha256": SHA,
        "index_sha256": hashlib.sha256(data).hexdigest(),
    }
    return Shard(**{**known, **more})


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        *(
            ([entry(key=key)], r"entries\.0\.key: String should match")
            for key in ("../x", "/etc/x", "a/b", "a.b", "a\\b", "a\0b", "a\n", "", "-rf")
        ),
        ([entry(key=7)], r"entries\.0\.key: Input should be a valid string"),
        ([entry(height="64")], r"entries\.0\.height: Input should be a valid integer"),
        ([entry(height=64.0)], r"entries\.0\.height: "),
        ([entry(height=True)], r"entries\.0\.height: "),
        ([entry(height=0)], r"entries\.0\.height: .*greater than or equal to 1"),
        ([entry(**parts(offset=-1))], r"clean\.ppm\.offset: .*greater than or equal to 0"),
        ([entry(**parts(size=-5))], r"clean\.ppm\.size: "),
        ([entry(**parts(sha256="beef"))], r"clean\.ppm\.sha256: "),
        ([entry(**parts(offset=10**30))], r"a\.clean\.ppm ends at byte 10{25}\d+, but the shard has 40960"),
        ([entry(**parts(offset=30000))], r"a\.clean\.ppm ends at byte 45373, but the shard has 40960"),
        ([entry(**parts(offset=10000))], r"a\.json begins at byte 20000, inside a\.clean\.ppm"),
        ([entry(**parts(size=100))], r"a\.clean\.ppm has 100 bytes, but 80x64 pixels take 15373"),
        ([entry(height=10**9, width=10**9)], r"a\.clean\.ppm has 15373 bytes, but 1000000000x1000000000 pixels"),
        ([entry(parts={**entry()["parts"], "evil.sh": entry()["parts"]["json"]})], r"parts\.evil\.sh"),
        ([entry(parts={"json": entry()["parts"]["json"]})], r"a holds json; not what clean samples hold"),
        ([entry(parts={})], r"a holds nothing; not what clean samples hold"),
        ([entry(), entry()], r"lists 2 samples, the manifest 1"),
        ([entry(more=1)], r"entries\.0\.more: Extra inputs are not permitted"),
        ("none", r"entries: Input should be"),
        ([None], r"entries\.0: Input should be"),
    ],
)
def test_an_index_that_cannot_be_true_is_refused_by_file_and_place(entries: Any, said: str) -> None:
    data = json.dumps({"entries": entries}).encode()
    with pytest.raises(UserError, match=rf"train-s-00000\.index\.json.*{said}") as fault:
        read_index(data, shard_of(data), "here/train-s-00000.index.json")
    assert str(fault.value).endswith("Copy it again, or build the shards again.")


def test_a_key_twice_or_an_image_below_the_least_side_is_refused() -> None:
    data = json.dumps({"entries": [entry(), entry()]}).encode()
    with pytest.raises(UserError, match="x: the key a appears there twice"):
        read_index(data, shard_of(data, samples=2), "x")
    data = json.dumps({"entries": [entry()]}).encode()
    with pytest.raises(UserError, match="x: a is 80x64, but the manifest says that no side is below 65 pixels"):
        read_index(data, shard_of(data, least_pixels=65), "x")
    assert read_index(data, shard_of(data), "x").entries[0].image("clean") is not None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 5000, b'{"entries": 1}'])
def test_bytes_that_are_no_index_are_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="^here is not an index of a shard"):
        read_index(data, shard_of(data), "here")


def manifest_of(**more: Any) -> bytes:
    shard = {**shard_of(b"").model_dump(), **more}
    return json.dumps({"format": "mirl-dist-shards-2", "name": "n", "recipe": SHA, "shards": [shard]}).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "here is not a manifest of shards"),
        (b"\xff\xfe", "here is not a manifest of shards"),
        (b"[" * 100_000, "here is not a manifest of shards"),
        (b"[]", "here says format None; this version reads 'mirl-dist-shards-2'"),
        (b'{"format": "mirl-dist-shards-1"}', "here says format 'mirl-dist-shards-1'"),
        (b'{"format": "mirl-dist-shards-2"}', r"here is not a manifest of shards .name: Field required"),
        *(
            (manifest_of(name=name), r"shards\.0\.name")
            for name in ("../x.tar", "/x.tar", "a/x.tar", "..tar", "x", "x\0.tar")
        ),
        (manifest_of(set="../x"), r"shards\.0\.set"),
        (manifest_of(kind="denoise"), r"shards\.0\.kind"),
        (manifest_of(samples=0), r"shards\.0\.samples"),
        (manifest_of(bytes=-1), r"shards\.0\.bytes"),
        (manifest_of(least_pixels="64"), r"shards\.0\.least_pixels"),
        (manifest_of(sha256="../" * 21 + "x"), r"shards\.0\.sha256"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused_by_place(data: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_manifest(data, "here")


def test_a_shard_named_twice_is_refused() -> None:
    raw = json.loads(manifest_of())
    raw["shards"] *= 2
    with pytest.raises(UserError, match=r"here names the shard train-s-00000\.tar twice"):
        read_manifest(json.dumps(raw).encode(), "here")


def test_a_ppm_that_only_its_digest_vouches_for_is_named(copy: Path, built: tuple[Path, Manifest]) -> None:
    """Every digest fits, but the header says another size, so that a crop would be read askew."""
    shard = built[1].shards[0]
    index = indices(*built)[shard.name]
    part = index.entries[0].parts["clean.ppm"]
    data = bytearray((copy / shard.name).read_bytes())
    data[part.offset : part.offset + 8] = b"P6\n64 80"
    raw = json.loads((copy / shard.index_name).read_bytes())
    held = bytes(data[part.offset : part.offset + part.size])
    raw["entries"][0]["parts"]["clean.ppm"]["sha256"] = hashlib.sha256(held).hexdigest()
    resealed(copy, shard, bytes(data), json.dumps(raw).encode())
    said = f"{shard.name}: {index.entries[0].key}.clean.ppm does not begin as a PPM file of 80x64 pixels does"
    assert check(Folder(copy), 1, quiet) == [said]


def test_notes_of_another_set_or_none_are_named(copy: Path, built: tuple[Path, Manifest]) -> None:
    shard = built[1].shards[0]
    resealed(copy, shard, kind="clean", set="other")
    faults = check(Folder(copy), 1, quiet)
    assert len(faults) == 6 and faults[0].endswith(".json names the set and kind clean, clean")
