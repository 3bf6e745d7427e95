"""Killed, or out of room, before every single file operation: never half patched, never a lost edit.

`pytest -rP` shows at how many points.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sglang_patchset import cli, targets, wheels
from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError

from .conftest import Command, change, digest, edit, link
from .faults import Fault, disk_full_from, killed_at, noted_in, refused_at, stumble

DSV4, HASH = "dsv4-expert-distribution", "hash-topk-dummy-weights"
EPLB = "eplb-double-mapping"  # without which DSV4 must not be
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
INFO = "sglang-0.5.12.dist-info"
TOLD = (HASH_TOPK, "/RECORD", "/_patchset.json")


@dataclass(frozen=True)
class Scene:
    """A tree before and after one verb, with the other verb's way back."""

    verb: str
    fixes: tuple[str, ...]
    source: Path
    before: Mapping[str, str]
    after: Mapping[str, str]

    def action(self, tree: Path) -> Callable[[], int]:
        return lambda: cli.main([self.verb, str(tree), *self.fixes])

    def patched(self, verb: str) -> Mapping[str, str]:
        """What the tree has to be after a verb."""
        return self.after if verb == self.verb else self.before


@pytest.fixture(params=["installed", "checkout"])
def layout(request: pytest.FixtureRequest, unpacked: Mapping[str, Path], tmp_path: Path) -> Path:
    """A package with RECORD as pip leaves it, and one without as in a checkout; both with a user's edits."""
    tree = link(unpacked["0.5.12"], tmp_path / "layout")
    if request.param == "checkout":
        shutil.rmtree(tree / INFO)
        for name in (".git", "python"):
            (tree / name).mkdir()
        (tree / "sglang").rename(tree / "python" / "sglang")
    package = tree / "python" if request.param == "checkout" else tree
    # One in a file that no fix touches; two in one that the fixes touch, of which one is next to their lines.
    edit(package / "sglang" / "utils.py", "# mine")
    edit(package / HASH_TOPK, "# mine")
    change(package / HASH_TOPK, "self.routed_scaling_factor = routed_scaling_factor", "self.mine = 1")
    (package / HASH_TOPK).chmod(0o600)
    return tree


@pytest.fixture(params=["apply", "revert"])
def scene(request: pytest.FixtureRequest, layout: Path, command: Command, tmp_path: Path) -> Scene:
    fixes = (EPLB, DSV4, HASH)
    other = link(layout, tmp_path / "other")
    assert command("apply", other, *fixes).code == 0
    ends = {"apply": other, "revert": layout}
    source = ends["revert" if request.param == "apply" else "apply"]
    return Scene(request.param, fixes, source, digest(source), digest(ends[request.param]))


def settled(tree: Path) -> dict[str, str]:
    """A tree without what a run keeps in it for the next one."""
    return {path: entry for path, entry in digest(tree).items() if ".patchset-transaction" not in path}


def listed(scene: Scene, tmp_path: Path) -> list[str]:
    """The operations of a run that nothing happens to."""
    tree = link(scene.source, tmp_path / "tree")
    assert stumble(scene.action(tree), tree, noted_in(tmp_path / "operations")) == 0
    shutil.rmtree(tree)
    return (tmp_path / "operations").read_text().split()


def came_through(
    scene: Scene, tree: Path, verb: str, command: Command, tmp_path: Path, *, back: bool = False
) -> str:
    """See to a tree whose run was killed, on its way back perhaps; tells which of the three it was."""
    status = command("status", tree)
    found = settled(tree)
    interrupted = "interrupted" in status.out
    if interrupted:
        assert status.code == 2
    else:
        assert found in (scene.before, scene.after)
    # An edit that comes now is not lost either, and in nobody's way.
    edited = link(tree, tmp_path / "edited")
    (file,) = edited.rglob(HASH_TOPK)
    edit(file, "# mine too")
    mine = digest(edited)
    result = command(verb, edited, *scene.fixes)
    assert command(verb, tree, *scene.fixes).code == 0
    assert digest(tree) == scene.patched(verb)
    if back and interrupted and result.code:
        # It is one of the new file, and the others cannot follow any more.
        assert f"{file}: edited after a run was interrupted: save it, `cp " in result.refusal()
        held = str(file.relative_to(edited)).replace(HASH_TOPK, "sglang/.patchset-transaction.tmp")
        assert {**digest(edited), held: ""} == {**mine, held: ""}
    else:
        assert result.code == 0
        (without,) = tree.rglob(HASH_TOPK)
        assert file.read_text() == without.read_text() + "# mine too\n"
        # An edited file has another mode, and RECORD and the receipt may tell of it.
        told = [
            {path: entry for path, entry in digest(each).items() if not path.endswith(TOLD)}
            for each in (tree, edited)
        ]
        assert told[0] == told[1]
    shutil.rmtree(edited)
    shutil.rmtree(tree)
    return "interrupted" if interrupted else "before" if found == scene.before else "after"


def test_killed_at_every_operation(
    scene: Scene, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    place = tmp_path / "place"
    scratch = place / "scratch"
    scratch.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    points: Counter[str] = Counter()
    step, code = 0, -9
    while code == -9:
        step += 1
        tree = link(scene.source, place / "tree")
        code = stumble(scene.action(tree), place, killed_at(step))
        # What is left of a copy for git is in nobody's way.
        for path in scratch.iterdir():
            assert path.name.startswith("sglang-patchset-")
            shutil.rmtree(path)
        if digest(tree) == scene.before:
            points["untouched"] += 1
            shutil.rmtree(tree)
            continue
        points[came_through(scene, tree, ("apply", "revert")[step % 2], command, tmp_path)] += 1
        assert list(scratch.iterdir()) == []
    assert code == 0
    assert set(points) == {"untouched", "before", "interrupted", "after"}
    print(f"killed at {step - 1} points: {dict(points)}")
    assert step > 100
    assert digest(scene.source) == scene.before


def test_killed_on_the_way_back(
    scene: Scene, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last file cannot be replaced, those before it are put back: killed at that."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    operations = listed(scene, tmp_path)
    stuck = len(operations) - operations[::-1].index("os.rename")
    points: Counter[str] = Counter()
    step, code = stuck, -9
    while code == -9:
        step += 1
        tree = link(scene.source, tmp_path / "tree")
        code = stumble(scene.action(tree), tree, killed_at(step, after=refused_at(stuck)))
        if code == -9:
            verb = ("apply", "revert")[step % 2]
            points[came_through(scene, tree, verb, command, tmp_path, back=True)] += 1
    assert code == 2
    assert digest(tree) == scene.before
    print(f"killed at {step - stuck - 1} points: {dict(points)}")
    assert set(points) == {"before", "interrupted"}


@pytest.mark.parametrize("fault", [disk_full_from, refused_at])
def test_failing_at_every_operation(
    fault: Callable[[int], Fault], scene: Scene, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A full disk and a bad one: refused in one line, and nothing changed; or done."""
    codes: Counter[int] = Counter()
    for step in range(1, len(listed(scene, tmp_path)) + 1):
        tree = link(scene.source, tmp_path / "tree")
        capfd.readouterr()
        code = stumble(scene.action(tree), tree, fault(step))
        codes[code] += 1
        assert digest(tree) == (scene.before if code else scene.after), step
        if code:
            assert code == 2
            message = capfd.readouterr().err
            assert message.startswith(f"sglang-patchset: {tree}")
            assert message.count("\n") == 1
            assert ": " in message.removeprefix("sglang-patchset: ")
        shutil.rmtree(tree)
    assert codes[2] >= 10
    assert digest(scene.source) == scene.before


@pytest.fixture
def small(unpacked: Mapping[str, Path], tables: Catalog, tmp_path: Path) -> tuple[Catalog, targets.Wheel]:
    """A wheel of what the tool looks at, and a table that pins it."""
    source = unpacked["0.5.12"]
    name = "sglang-0.5.12-py3-none-any.whl"
    file = tmp_path / name
    paths = [str(path.relative_to(source)) for path in sorted(source.rglob("*")) if path.is_file()]
    lines = (source / INFO / "RECORD").read_text().splitlines(keepends=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            data = (source / path).read_bytes()
            if path == f"{INFO}/RECORD":
                data = "".join(line for line in lines if line.split(",")[0] in paths).encode()
            archive.writestr(path, data)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    release = replace(tables.default, wheels={name: sha256})
    return replace(tables, releases={**tables.releases, release.version: release}), targets.Wheel(
        file, release.version
    )


@pytest.mark.parametrize("fault", [disk_full_from, refused_at])
def test_wheel_failing_at_every_operation(
    fault: Callable[[int], Fault], small: tuple[Catalog, targets.Wheel], tmp_path: Path
) -> None:
    tables, wheel = small
    out = tmp_path / "out"

    def action() -> int:
        try:
            wheels.patch(tables, wheel, out)
        except PatchsetError as error:
            return 2 if f"{out}: cannot be written to (" in str(error) else 3
        return 0

    codes: Counter[int] = Counter()
    # More than there are, and so the last write ends well; the assertion below would tell of too few.
    for step in range(1, 121):
        code = stumble(action, out, fault(step))
        codes[code] += 1
        assert [path.suffix for path in out.rglob("*")] == ([] if code else [".whl"])
        shutil.rmtree(out, ignore_errors=True)
    assert set(codes) == {0, 2}


@pytest.mark.parametrize("verb", ["wheel", "revert"])
def test_wheel_killed_at_every_operation(
    verb: str, small: tuple[Catalog, targets.Wheel], tmp_path: Path
) -> None:
    tables, wheel = small
    out = tmp_path / "out"
    patched = targets.Wheel(wheels.patch(tables, wheel, out), tables.default.patched_version)

    def action() -> int:
        if verb == "wheel":
            wheels.patch(tables, wheel, out)
        else:
            wheels.unpatch(tables, patched)
        return 0

    def contents() -> dict[str, bytes]:
        found = out.iterdir() if out.exists() else ()
        return {path.name: path.read_bytes() if path.is_file() else b"" for path in found}

    before = {} if verb == "wheel" else contents()
    action()
    after = contents()
    step, code = 0, -9
    while code == -9:
        step += 1
        shutil.rmtree(out)
        for name, data in before.items():
            out.mkdir()
            (out / name).write_bytes(data)
        code = stumble(action, out, killed_at(step))
        whole = {name: data for name, data in contents().items() if name.endswith(".whl")}
        assert whole in (before, after)
        # The next run takes away what a killed one left.
        action()
        assert contents() == after
    assert code == 0
    print(f"killed at {step - 1} points")
    assert step > 50
