"""Killed, or out of room, before every single file operation: never half patched, never a lost edit."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sglang_patchset import cli, targets, wheels
from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError

from .conftest import Command, digest, edit, link
from .faults import Fault, disk_full_from, killed_at, refused_at, stumble

DSV4, HASH = "dsv4-expert-distribution", "hash-topk-dummy-weights"
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
INFO = "sglang-0.5.12.dist-info"


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
    # One in a file that no fix touches, one in a file that the fixes touch.
    edit(package / "sglang" / "utils.py", "# mine")
    edit(package / HASH_TOPK, "# mine")
    (package / HASH_TOPK).chmod(0o600)
    return tree


@pytest.fixture(params=["apply", "revert"])
def scene(request: pytest.FixtureRequest, layout: Path, command: Command, tmp_path: Path) -> Scene:
    fixes = (DSV4, HASH)
    other = link(layout, tmp_path / "other")
    assert command("apply", other, *fixes).code == 0
    ends = {"apply": other, "revert": layout}
    source = ends["revert" if request.param == "apply" else "apply"]
    return Scene(request.param, fixes, source, digest(source), digest(ends[request.param]))


def settled(tree: Path) -> dict[str, str]:
    """A tree without what a run keeps in it for the next one."""
    return {path: entry for path, entry in digest(tree).items() if ".patchset-transaction" not in path}


def test_killed_at_every_operation(
    scene: Scene, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    seen: Counter[str] = Counter()
    step, code = 0, -9
    while code == -9:
        step += 1
        tree = link(scene.source, tmp_path / "tree")
        code = stumble(scene.action(tree), tree, killed_at(step))
        status = command("status", tree)
        if "interrupted" in status.out:
            assert status.code == 2
            seen["interrupted"] += 1
        else:
            found = settled(tree)
            assert found in (scene.before, scene.after)
            seen["before" if found == scene.before else "after"] += 1
        verb = ("apply", "revert")[step % 2]
        assert command(verb, tree, *scene.fixes).code == 0
        assert digest(tree) == scene.patched(verb)
        shutil.rmtree(tree)
    assert code == 0
    assert set(seen) == {"before", "interrupted", "after"}
    # In four scenes, and for the wheel below: more than 250 in all.
    assert sum(seen.values()) == step > 50
    assert digest(scene.source) == scene.before


@pytest.mark.parametrize("fault", [disk_full_from, refused_at])
def test_failing_at_every_operation(
    fault: Callable[[int], Fault], scene: Scene, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A full disk and a bad one: refused in one line, and nothing changed; or done."""
    operations = 0

    def count(_: str, number: int) -> None:
        nonlocal operations
        operations = number
        Path(tmp_path, "count").write_text(str(number))

    tree = link(scene.source, tmp_path / "tree")
    assert stumble(scene.action(tree), tree, count) == 0
    operations = int(Path(tmp_path, "count").read_text())
    shutil.rmtree(tree)
    codes: Counter[int] = Counter()
    for step in range(1, operations + 1):
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
    for step in range(1, 70):
        code = stumble(action, out, fault(step))
        codes[code] += 1
        assert [path.suffix for path in out.rglob("*")] == ([] if code else [".whl"])
        shutil.rmtree(out, ignore_errors=True)
    assert set(codes) == {0, 2}


def test_wheel_killed_at_every_operation(small: tuple[Catalog, targets.Wheel], tmp_path: Path) -> None:
    tables, wheel = small
    out = tmp_path / "out"
    done = wheels.patch(tables, wheel, out).read_bytes()
    (name,) = (path.name for path in out.iterdir())
    shutil.rmtree(out)

    def action() -> int:
        wheels.patch(tables, wheel, out)
        return 0

    step, code = 0, -9
    while code == -9:
        step += 1
        code = stumble(action, out, killed_at(step))
        left = list(out.rglob("*")) if out.exists() else []
        assert [path.read_bytes() for path in left if path.suffix == ".whl"] in ([], [done])
        # The next run takes away what a killed one left.
        wheels.patch(tables, wheel, out)
        assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [(name, done)]
        shutil.rmtree(out)
    assert code == 0
    assert step > 50
