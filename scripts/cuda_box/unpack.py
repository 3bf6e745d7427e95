"""What unpack.sh does. It runs on the box's Python, which has nothing of ours, and knows the bundle by its
manifest.json.
"""

from __future__ import annotations

import compileall
import hashlib
import io
import json
import os
import platform
import shutil
import site
import sys
import tarfile
import time
import venv
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

BUNDLE = Path(__file__).resolve().parent
LOCK = "tests/regression/requirements-cuda.txt"


class RefusalError(Exception):
    """Says in one line what is wrong, where, and what to do next. Nothing was changed."""


class Slices(io.RawIOBase):
    """A range of the bytes that the slices are together."""

    def __init__(self, slices: list[Path], start: int, size: int) -> None:
        self._left = []
        for path in slices:
            length = path.stat().st_size
            if start < length and size:
                taken = min(length - start, size)
                self._left.append((path, start, taken))
                size -= taken
            start = max(0, start - length)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            return 0
        path, start, size = self._left[0]
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            read = file.readinto(memoryview(buffer)[:size])
        self._left[0] = (path, start + read, size - read)
        if read == size:
            del self._left[0]
        return read


def main(arguments: list[str]) -> int:
    """Unpack into the one clone that is named."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: unpack.sh CLONE", file=sys.stderr)
        return 2
    clone = Path(arguments[0]).resolve()
    started = time.monotonic()
    try:
        check_bundle()
        manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
        check_python(manifest)
        check_clone(manifest, clone)
        unpack(manifest, clone)
    except (RefusalError, OSError) as error:
        print(f"unpack.sh: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            f"unpack.sh: {clone}: a process was killed, by lack of memory perhaps: run it again",
            file=sys.stderr,
        )
        return 2
    made = f".venv-gpu and {len(manifest['trees'])} trees made in {time.monotonic() - started:.0f} s"
    print(f"{clone}: {made}; next: ./scripts/gpu_test.sh")
    return 0


def check_bundle() -> None:
    """Refuse a bundle that is not whole."""
    sums = BUNDLE / "SHA256SUMS"
    if not sums.is_file():
        raise RefusalError(f"{sums}: missing: copy it again")
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, name = line.split("  ", 1)
        if not (BUNDLE / name).is_file():
            raise RefusalError(f"{BUNDLE / name}: missing: copy it again")
        if sha256(BUNDLE / name) != expected:
            raise RefusalError(f"{BUNDLE / name}: not what SHA256SUMS says: copy it again")


def check_python(manifest: dict[str, Any]) -> None:
    """Refuse a Python that the bundle is not for, or that lacks what the bundle expects of it."""
    version = ".".join(platform.python_version_tuple()[:2])
    found = f"{platform.python_implementation()} {version} on {platform.machine()}"
    wanted = f"CPython {manifest['python']} on {manifest['machine']}"
    if found != wanted:
        raise RefusalError(
            f"{sys.executable}: {found}, and the bundle is for {wanted}: put that first on PATH, as python3"
        )
    expected = manifest["expected"].items()
    lacking = [f"{name}=={version}" for name, version in expected if version_of(name) != version]
    if lacking:
        raise RefusalError(
            f"{sys.executable}: lacks {len(lacking)} packages that were left out ({', '.join(lacking[:3])}): "
            "pack again, with this Python's `pip list --format=freeze` as --have"
        )


def check_clone(manifest: dict[str, Any], clone: Path) -> None:
    """Refuse a clone that wants another environment."""
    lock = clone / LOCK
    if not lock.is_file():
        raise RefusalError(f"{lock}: missing: name a clone of sglang-patchset")
    if sha256(lock) != manifest["lock"]:
        raise RefusalError(
            f"{lock}: not the one that the bundle was made for: pack it again, from this clone's commit"
        )


def unpack(manifest: dict[str, Any], clone: Path) -> None:
    """Make the environment and the trees; `made-for` says last that all is there."""
    environment, trees, draft = clone / ".venv-gpu", clone / ".cache/trees", clone / ".cache/unpacking"
    for left in (environment, draft):  # from an earlier run, killed perhaps
        if left.exists():
            shutil.rmtree(left)
    draft.mkdir(parents=True)
    venv.create(environment, symlinks=True)
    packages = environment / "lib" / f"python{manifest['python']}" / "site-packages"
    with zipfile.ZipFile(BUNDLE / manifest["decompressor"]) as wheel:
        wheel.extractall(draft / "decompressor")
    roots = {"site": packages, "trees": draft / "trees"}
    for part in manifest["parts"]:
        if "file" in part:
            # Here, because two processes that make the same directory can get into each other's way.
            (roots[part["into"]] / part["file"]).parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        running = [
            pool.submit(unpack_part, manifest, part, roots[part["into"]], draft / "decompressor")
            for part in manifest["parts"]
        ]
        for each in running:
            each.result()
    for program in (packages / "bin").glob("*"):  # where pip's and uv's --target put them
        os.replace(program, environment / "bin" / program.name)
    # The box's Python may itself be an environment's: asking venv for the system's packages is not enough.
    behind = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    lines = [f"import site; site.addsitedir({directory!r})\n" for directory in behind]
    (packages / "box.pth").write_text("".join(lines), encoding="utf-8")
    trees.mkdir(exist_ok=True)
    for name in manifest["trees"]:
        if (trees / name).exists():
            shutil.rmtree(trees / name)
        os.rename(draft / "trees" / name, trees / name)
    shutil.rmtree(draft)
    # The tests import all this some two hundred times, and many of them at once the first time.
    for directory in (packages, *(trees / name for name in manifest["trees"])):
        compileall.compile_dir(directory, quiet=2, workers=0)
    shutil.copyfile(clone / LOCK, environment / "made-for.part")
    os.replace(environment / "made-for.part", environment / "made-for")


def unpack_part(manifest: dict[str, Any], part: dict[str, Any], root: Path, decompressor: Path) -> None:
    """Unpack one part, in a process of its own."""
    sys.path.insert(0, str(decompressor))
    import zstandard

    slices = Slices([BUNDLE / name for name in manifest["slices"]], part["start"], part["size"])
    decompress = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    content = decompress.stream_reader(io.BufferedReader(slices, 1 << 20), read_size=1 << 20)
    if "file" in part:
        with (root / part["file"]).open("wb") as target:
            shutil.copyfileobj(content, target, 1 << 20)
        return
    with tarfile.open(fileobj=content, mode="r|", bufsize=1 << 20) as archive:
        # The hash of the archive was checked; a Python without filters wants none.
        archive.extraction_filter = lambda member, _: member
        archive.extractall(root)


def version_of(package: str) -> str | None:
    """The version of a package of this Python."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sha256(file: Path) -> str:
    """A file's sha256."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for chunk in iter(lambda: content.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
