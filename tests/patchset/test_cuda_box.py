"""The bundle for an offline CUDA box: packed of a few small files, unpacked by its own unpack.sh."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError

from .conftest import ROOT, digest

sys.path.insert(0, str(ROOT / "scripts"))

import cuda_environment
import pack_cuda_box
from pack_cuda_box import FLASH_OPS, Meter

LOCK = "tests/regression/requirements-cuda.txt"
TREE = "0.5.12-published-cpython-312"


@dataclass(frozen=True)
class Box:
    """A directory with what is packed, the bundle, and a clone to unpack it into."""

    path: Path

    @property
    def site(self) -> Path:
        return self.path / "site"

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def clone(self) -> Path:
        return self.path / "clone"

    def pack(self, slice_size: int = 1000, **manifest: Any) -> list[Path]:
        """Write the bundle; returns its slices."""
        self.cache.mkdir(exist_ok=True)
        decompressor = self.cache / "zstandard-0-py3-none-any.whl"
        with zipfile.ZipFile(decompressor, "w") as wheel:
            for name, path in pack_cuda_box.files_in(Path(zstandard.__file__).parent).items():
                wheel.write(path, f"zstandard/{name}")
        described = {
            "python": ".".join(platform.python_version_tuple()[:2]),
            "machine": platform.machine(),
            "lock": hashlib.sha256((self.clone / LOCK).read_bytes()).hexdigest(),
            "expected": {"rich": importlib.metadata.version("rich")},
            "trees": [TREE],
        }
        with Meter() as meter:
            parts = pack_cuda_box.parts(self.site, [self.path / TREE])
            packed = pack_cuda_box.compress(parts, self.cache, meter)
        pack_cuda_box.write(self.out, packed, decompressor, slice_size, {**described, **manifest})
        return sorted(self.out.glob("slice.*"))

    def unpack(self, clone: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run unpack.sh with nothing but this Python, as python3."""
        path = self.path / "path"
        path.mkdir(exist_ok=True)
        python = path / "python3"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (path / "dirname").unlink(missing_ok=True)
        (path / "dirname").symlink_to(shutil.which("dirname") or "")
        command = [self.out / "unpack.sh", clone or self.clone]
        return subprocess.run(command, env={"PATH": str(path)}, capture_output=True, text=True, check=False)

    def refusal(self) -> str:
        """The one line of a refusal that changed nothing."""
        before = digest(self.clone)
        result = self.unpack()
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("unpack.sh: ")
        assert result.stderr.count("\n") == 1
        assert digest(self.clone) == before
        return result.stderr

    def run(self, code: str) -> str:
        """What the environment's Python prints."""
        command = [self.clone / ".venv-gpu/bin/python", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def box(tmp_path: Path) -> Box:
    box = Box(tmp_path)
    files: Mapping[Path, bytes] = {
        box.site / FLASH_OPS: os.urandom(3000),
        box.site / "sgl_kernel/__init__.py": b"",
        box.site / "packaging/__init__.py": b"__version__ = 'of the bundle'\n",
        box.site / "packaging/__pycache__/__init__.pyc": b"bytecode",
        box.site / "bin/ninja": b"#!/bin/sh\necho compiling\n",
        tmp_path / TREE / "sglang/__init__.py": b"__version__ = '0.5.12'\n",
        box.clone / LOCK: b"packaging==26.3\n",
    }
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (box.site / "bin/ninja").chmod(0o755)
    return box


def test_pack_and_unpack(box: Box) -> None:
    box.pack()
    result = box.unpack()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{box.clone}: .venv-gpu and 1 trees made in ")

    environment = box.clone / ".venv-gpu"
    assert (environment / "made-for").read_bytes() == (box.clone / LOCK).read_bytes()
    # It is compiled there, so that not every test has to.
    for made in (box.clone / ".cache/trees" / TREE / "sglang", environment):
        assert list(made.rglob(f"__pycache__/__init__.{sys.implementation.cache_tag}.pyc"))
    shutil.rmtree(box.clone / ".cache/trees" / TREE / "sglang/__pycache__")
    assert digest(box.clone / ".cache/trees") == {
        TREE: "40755 ",
        f"{TREE}/sglang": "40755 ",
        f"{TREE}/sglang/__init__.py": f"100644 {_sha256(box.path / TREE / 'sglang/__init__.py')}",
    }
    assert [path.name for path in (box.clone / ".cache").iterdir()] == ["trees"]
    assert subprocess.check_output(environment / "bin/ninja", text=True) == "compiling\n"
    flash_ops = box.run("import sgl_kernel; print(sgl_kernel.__path__[0])") + "/flash_ops.abi3.so"
    assert _sha256(Path(flash_ops)) == _sha256(box.site / FLASH_OPS)
    assert not list(environment.rglob("packaging/__pycache__/__init__.pyc"))


def test_the_box_s_packages_come_behind_the_bundle_s(box: Box) -> None:
    box.pack()
    box.unpack()
    assert box.run("import packaging; print(packaging.__version__)") == "of the bundle"
    assert box.run("import rich, os; print(os.path.dirname(rich.__file__))") == str(
        importlib.metadata.distribution("rich").locate_file("rich")
    )


@pytest.mark.parametrize("size", [1, 1000, 10**9])
def test_as_few_slices_as_fit(box: Box, size: int) -> None:
    slices = box.pack(size)
    packed = sum(path.stat().st_size for path in box.cache.glob("*.zst"))
    assert len(slices) == -(-packed // size)
    assert max(path.stat().st_size for path in slices) <= size
    # Those of an earlier run do not stay.
    assert len(box.pack(5000)) == -(-packed // 5000)
    assert box.unpack().returncode == 0


def test_sha256sums_can_be_checked_by_hand(box: Box) -> None:
    box.pack()
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=box.out, check=True)
    listed = {line.split("  ")[1] for line in (box.out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in box.out.iterdir()} - {"SHA256SUMS"}


def test_a_second_run_compresses_what_changed(box: Box) -> None:
    first = box.pack()
    contents = [path.read_bytes() for path in first]
    packed = {path.name: path.stat().st_ino for path in box.cache.glob("*.zst")}
    os.utime(box.site / "sgl_kernel/__init__.py", (1e9, 1e9))
    assert [path.read_bytes() for path in box.pack()] == contents
    assert {path.name: path.stat().st_ino for path in box.cache.glob("*.zst")} == packed

    (box.site / "sgl_kernel/__init__.py").write_text("changed = True\n")
    box.pack()
    (added,) = {path.name for path in box.cache.glob("*.zst")} - set(packed)
    assert added.startswith("site-")


def test_interrupted_packing_leaves_nothing_half(box: Box) -> None:
    meter = Meter()
    meter.stopped = True
    box.cache.mkdir()
    with pytest.raises(KeyboardInterrupt):
        pack_cuda_box.compress(pack_cuda_box.parts(box.site, []), box.cache, meter)
    assert list(box.cache.iterdir()) == []


def test_changed_slice(box: Box) -> None:
    changed = box.pack()[1]
    changed.write_bytes(bytes(byte ^ 1 for byte in changed.read_bytes()))
    assert box.refusal() == f"unpack.sh: {changed}: not what SHA256SUMS says: copy it again\n"


@pytest.mark.parametrize("name", ["slice.001", "manifest.json", "SHA256SUMS"])
def test_missing_file(box: Box, name: str) -> None:
    box.pack()
    (box.out / name).unlink()
    assert box.refusal() == f"unpack.sh: {box.out / name}: missing: copy it again\n"


def test_not_a_clone(box: Box) -> None:
    box.pack()
    (box.clone / LOCK).unlink()
    assert "name a clone of sglang-patchset" in box.refusal()


def test_clone_of_another_commit(box: Box) -> None:
    box.pack()
    (box.clone / LOCK).write_text("packaging==1\n")
    assert "pack it again, from this clone's commit" in box.refusal()


def test_another_python(box: Box) -> None:
    box.pack(python="3.8")
    assert f"the bundle is for CPython 3.8 on {platform.machine()}" in box.refusal()


def test_box_has_changed_since(box: Box) -> None:
    box.pack(expected={"rich": "0.1", "torch-of-nobody": "2.11.0"})
    assert "lacks 2 packages that were left out (rich==0.1, torch-of-nobody==2.11.0)" in box.refusal()


def test_interrupted_unpacking_is_done_again(box: Box) -> None:
    box.pack()
    assert box.unpack().returncode == 0
    trees = box.clone / ".cache/trees"
    shutil.rmtree(trees)
    trees.write_text("in the way\n")
    (box.clone / ".venv-gpu/left").touch()

    failed = box.unpack()
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert not (box.clone / ".venv-gpu/made-for").exists()

    trees.unlink()
    assert box.unpack().returncode == 0
    assert (box.clone / ".venv-gpu/made-for").exists()
    assert not (box.clone / ".venv-gpu/left").exists()
    assert [path.name for path in (box.clone / ".cache").iterdir()] == ["trees"]


@pytest.mark.parametrize(("text", "size"), [("60M", 60 << 20), ("2G", 2 << 30), ("5K", 5120), ("700", 700)])
def test_slice_size(text: str, size: int) -> None:
    assert pack_cuda_box.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "60MB", "1.5G", "-1"])
def test_slice_size_refused(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pack_cuda_box.main(["--release", "0.5.12", f"--slice={text}", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err == (
        f"pack_cuda_box.py: --slice {text}: not a size: write 60M, 2G, or a number of bytes\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_the_box_has(tmp_path: Path) -> None:
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("torch==2.11.0+cu130\nTyping_Extensions==4.16.0\n")
    has = pack_cuda_box.parse_pins(freeze)
    assert has == {"torch": "2.11.0+cu130", "typing-extensions": "4.16.0"}
    assert pack_cuda_box.is_had(has, "torch", "2.11.0")
    assert not pack_cuda_box.is_had(has, "typing-extensions", "4.16.1")
    assert not pack_cuda_box.is_had(has, "numpy", "2.5.2")

    freeze.write_text("torch==2.11.0\nPackage    Version\n")
    with pytest.raises(PatchsetError, match=f"{freeze}:2: not NAME==VERSION"):
        pack_cuda_box.parse_pins(freeze)


def test_release_of_the_lock(tables: Catalog) -> None:
    lock = pack_cuda_box.parse_pins(pack_cuda_box.LOCK)
    assert pack_cuda_box.locked_release(tables, "0.5.12", lock) == tables.default
    with pytest.raises(PatchsetError, match=r"0\.5\.11: runs with sglang-kernel 0\.4\.2, .* choose 0\.5\.12"):
        pack_cuda_box.locked_release(tables, "0.5.11", lock)
    with pytest.raises(PatchsetError, match=r"0\.4\.0: not a pinned release: choose from 0\.5\.11, "):
        pack_cuda_box.locked_release(tables, "0.4.0", lock)


def test_prune(box: Box) -> None:
    kept = set(pack_cuda_box.files_in(box.site))
    dropped = (
        "bin/uvicorn",
        "lib/mscclpp.so",
        "sgl_kernel/sm100/common_ops.so",
        "zmq/tests/test_it.py",
        ".lock",
    )
    for name in (*dropped, "torch/lib/libtorch.so", "zmq/latest.py"):
        (box.site / name).parent.mkdir(parents=True, exist_ok=True)
        (box.site / name).touch()
    pack_cuda_box.prune(box.site)
    assert set(pack_cuda_box.files_in(box.site)) == {*kept, "torch/lib/libtorch.so", "zmq/latest.py"}


def test_flash_mla_comes_from_another_kernel(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = box.path / "sglang_kernel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sgl_kernel/flash_mla.py", "FlashMLASchedMeta = get_mla_metadata = 'later'\n")
        archive.writestr("sgl_kernel/flashmla_ops.abi3.so", "later")
        archive.writestr("sgl_kernel/__init__.py", "later")
    monkeypatch.setattr(cuda_environment, "download", lambda *_: wheel)
    installed = box.site / "sgl_kernel/flash_mla.py"
    installed.write_text("earlier\n")
    (box.path / "installer-s-cache").hardlink_to(installed)

    assert cuda_environment.main([str(box.site)]) == 0
    assert (box.path / "installer-s-cache").read_text() == "earlier\n"
    assert (box.site / "sgl_kernel/__init__.py").read_bytes() == b""
    code = (
        "import flash_mla, flash_mla.flash_mla_interface as interface;"
        "print(flash_mla.get_mla_metadata, interface.FlashMLASchedMeta)"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(box.site)}, text=True
    )
    assert printed == "later later\n"

    monkeypatch.delattr(cuda_environment, "download")
    assert cuda_environment.main([str(box.site)]) == 0


def test_no_kernel_to_complete(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cuda_environment.main([str(tmp_path)]) == 2
    assert capfd.readouterr().err == (
        f"cuda_environment.py: {tmp_path}: has no sgl_kernel: "
        "install tests/regression/requirements-cuda.txt there first\n"
    )


def test_without_its_dependencies() -> None:
    script = ROOT / "scripts/pack_cuda_box.py"
    command = [sys.executable, "-I", "-S", str(script), "--release", "0.5.12", "--slice", "60M", "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "run `pip install '.[pack]'` in the clone first" in result.stderr


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
