#!/usr/bin/env python3
"""Packs what an offline CUDA box lacks for the GPU regression tests:

    ./scripts/pack_cuda_box.py --release 0.5.12 --slice 60M [--have freeze.txt] OUT

freeze.txt is the box's `pip list --format=freeze`: what it has is not brought. Without it, everything is. OUT
is carried to the box; `OUT/unpack.sh CLONE` makes there what scripts/gpu_test.sh would make from a package
index. Its GPUs have to be Hopper's: Blackwell's kernels are not packed.

`pip install '.[pack]'` brings what this script needs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

try:
    import zstandard
    from packaging.tags import Tag
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version
    from rich.console import Console
    from rich.progress import Progress

    from sglang_patchset import catalog
    from sglang_patchset.catalog import Catalog, Release
    from sglang_patchset.errors import PatchsetError
    from sglang_patchset.proof import cuda
    from sglang_patchset.proof.trees import Trees
except ImportError as missing:
    print(f"pack_cuda_box.py: {missing}: run `pip install '.[pack]'` in the clone first", file=sys.stderr)
    sys.exit(2)

import cuda_environment

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "tests/regression/requirements-cuda.txt"
PYTHON = "3.12"
MACHINE = "x86_64"
LIBC = "manylinux_2_34"  # what SGLang's wheels are for
DECOMPRESSOR = ("zstandard==0.25.0", "5a56ba0db2d244117ed744dfa8f6f5b366e14148e00de44723413b2f3938a902")

UNPACKER = (ROOT / "scripts/cuda_box/unpack.sh", ROOT / "scripts/cuda_box/unpack.py")

# Packages that the lock has because another one requires them, and that the tests do not miss.
NOT_BROUGHT = (
    "cuda-python",  # nothing but requirements, of which cuda-bindings is locked by itself
    "nvidia-cutlass-dsl-libs-base",  # the compiler of kernels that Hopper's backends do not use
)
# What the packages bring and the tests do not miss; a * matches slashes too.
DROPPED = (
    ".lock",  # uv's own
    "bin/*",  # scripts that name this machine's Python; programs are named below
    "lib/*",  # mscclpp's libraries, the static ones among them: for collectives on several nodes
    "sgl_kernel/sm100/*",  # Blackwell's half of the kernels
    "build_backend.py",  # flashinfer's and torch-c-dlpack-ext's: whose of the two stays is chance
    "tests/*",
    "*/tests/*",  # the packages' own tests
)
PROGRAMS = ("bin/ninja",)  # kernels are compiled by it
# By far the largest file, which compresses best by itself: FlashAttention 3, one kernel in many variants.
FLASH_OPS = "sgl_kernel/flash_ops.abi3.so"


@dataclass(frozen=True)
class Part:
    """What is compressed as one stream: files by their names in the archive, or `file` as it is.

    `into` is where the archive is unpacked: "site" or "trees".
    """

    name: str
    into: str
    files: Mapping[str, Path]
    level: int
    window_log: int
    file: str = ""

    def write(self, target: Any) -> None:
        """Write the part uncompressed: the same bytes for the same files, whenever and by whomever."""
        if self.file:
            with self.files[self.file].open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
            return
        with tarfile.open(fileobj=target, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 20) as archive:
            for name, path in sorted(self.files.items()):
                entry = tarfile.TarInfo(name)
                entry.size = path.stat().st_size
                entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
                # Zero means to ninja, which compiles kernels from these files, that there is no file.
                entry.mtime = 1
                with path.open("rb") as source:
                    archive.addfile(entry, source)


@dataclass(frozen=True)
class Packed:
    """A part and its compressed file."""

    part: Part
    path: Path


class Meter:
    """How far the parts are: bars on a terminal, elsewhere a line every half minute."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(console=console) if console.is_terminal else None
        self._said: dict[str, float] = {}
        self.stopped = False

    def __enter__(self) -> Meter:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped = True
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bars:
            self._bars.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def track(self, name: str, total: int) -> Callable[[int], None]:
        """What to call with the number of bytes that were worked off."""
        done = 0
        said = time.monotonic()
        bar = self._bars.add_task(name, total=total) if self._bars else None

        def advance(count: int) -> None:
            nonlocal done, said
            if self.stopped:
                raise KeyboardInterrupt  # compressing takes minutes, in a thread that no signal reaches
            done += count
            if self._bars and bar is not None:
                self._bars.update(bar, completed=done)
            elif time.monotonic() - said >= 30:
                said = time.monotonic()
                self.say(f"{name}: {100 * done // total} %")

        return advance


class _Sink(io.RawIOBase):
    """Calls a function with what is written."""

    def __init__(self, take: Callable[[Any], object]) -> None:
        self._take = take

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._take(data)
        size: int = len(data)
        return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack.

    Returns:
        The exit code: 0, 2 for a refusal, 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="pack_cuda_box.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--release", required=True, help="the one to pack the environment of")
    parser.add_argument("--slice", required=True, metavar="SIZE", help="the longest file: 60M, 2G, or bytes")
    parser.add_argument("--have", type=Path, metavar="FILE", help="the box's `pip list --format=freeze`")
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
    options = parser.parse_args(arguments)
    try:
        pack(options.release, parse_size(options.slice), options.have, options.out)
    except (PatchsetError, cuda_environment.CompletionError, OSError) as error:
        print(f"pack_cuda_box.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pack_cuda_box.py: interrupted: run it again", file=sys.stderr)
        return 130
    return 0


def pack(release_name: str, slice_size: int, have: Path | None, out: Path) -> None:
    """The whole way, from the lock to `out`."""
    if importlib.util.find_spec("uv") is None:
        raise PatchsetError("no uv: run `pip install '.[pack]'` in the clone first")
    if out.exists() and not out.is_dir():
        raise PatchsetError(f"{out}: not a directory: name another one")
    tables = catalog.load()
    lock = parse_pins(LOCK)
    release = locked_release(tables, release_name, lock)
    has = parse_pins(have) if have else {}
    cache = ROOT / ".cache/cuda-box"
    cache.mkdir(parents=True, exist_ok=True)
    with Meter() as meter, tempfile.TemporaryDirectory(dir=cache) as scratch:
        meter.say("resolving")
        wanted = resolve(lock, has, Path(scratch))
        brought = {name: version for name, version in wanted.items() if not is_had(has, name, version)}
        meter.say(f"installing {len(brought)} packages, {len(wanted) - len(brought)} are on the box")
        site = Path(scratch, "site")
        install(brought, site)
        cuda_environment.complete(site)
        meter.say("making trees")
        trees = make_trees(tables)
        packed = compress(parts(site, trees), cache, meter)
        decompressor = cuda_environment.download(*DECOMPRESSOR, cache, PYTHON)
        manifest = {
            "release": str(release.version),
            "python": PYTHON,
            "machine": MACHINE,
            "lock": _sha256(LOCK),
            "brought": brought,
            "expected": {name: has[name] for name in wanted if name not in brought},
            "trees": [tree.name for tree in trees],
        }
        write(out, packed, decompressor, slice_size, manifest)
        megabytes = sum(each.path.stat().st_size for each in packed) / 1e6
        meter.say(f"{out}: {megabytes:.0f} MB; carry it to the box and run {out.name}/unpack.sh CLONE there")


def parse_size(text: str) -> int:
    """A number of bytes, from what the user wrote."""
    match = re.fullmatch(r"([1-9][0-9]*)([KMG]?)", text)
    if not match:
        raise PatchsetError(f"--slice {text}: not a size: write 60M, 2G, or a number of bytes")
    return int(match[1]) << 10 * " KMG".index(match[2] or " ")


def parse_pins(file: Path) -> dict[str, str]:
    """The versions that a lock or a list of installed packages names."""
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        package, _, version = line.partition("==")
        try:
            Version(version)
        except InvalidVersion:
            raise PatchsetError(
                f"{file}:{number}: not NAME==VERSION: make it by `pip list --format=freeze`"
            ) from None
        found[str(canonicalize_name(package))] = version
    return found


def locked_release(tables: Catalog, name: str, lock: Mapping[str, str]) -> Release:
    """The pinned release of that name, if the lock has what it runs with."""
    release = tables.release(name)
    for package, version in release.runs_with.items():
        if lock.get(package) != version:
            raise PatchsetError(
                f"{name}: runs with {package} {version}, and {LOCK.name} has {lock.get(package)}: "
                f"choose {tables.default_version}, whose environment serves the trees of all releases"
            )
    return release


def resolve(lock: Mapping[str, str], has: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """What the environment consists of: the box's own versions where they do, the locked ones otherwise."""
    merged, excluded = scratch / "merged.txt", scratch / "excluded.txt"
    # uv keeps the versions of an existing output wherever they fit. A local version (+cu130) is on no index.
    preferred = {**lock, **{package: Version(version).public for package, version in has.items()}}
    merged.write_text("".join(f"{package}=={version}\n" for package, version in preferred.items()))
    excluded.write_text("".join(f"{package}\n" for package in NOT_BROUGHT))
    unadorned = ("--no-annotate", "--no-header")
    _uv("compile", LOCK.with_suffix(".in"), "--output-file", merged, "--excludes", excluded, *unadorned)
    return parse_pins(merged)


def is_had(has: Mapping[str, str], package: str, version: str) -> bool:
    """Whether the box has a package at that very version."""
    return package in has and Version(Version(has[package]).public) == Version(version)


def install(packages: Mapping[str, str], site: Path) -> None:
    """Install the packages for the box, less what the tests do not miss."""
    listed = site.with_name("brought.txt")
    listed.write_text("".join(f"{package}=={version}\n" for package, version in packages.items()))
    _uv("install", "--no-deps", "--target", site, "--requirement", listed)
    prune(site)


def prune(site: Path) -> None:
    """Drop from a site directory what the tests do not miss."""
    for name, path in files_in(site).items():
        if name not in PROGRAMS and any(fnmatchcase(name, pattern) for pattern in DROPPED):
            path.unlink()


def make_trees(tables: Catalog) -> list[Path]:
    """The trees that the tests run on, made for the box's Python."""
    python = "cp" + PYTHON.replace(".", "")
    trees = Trees(tables, ROOT / ".cache/trees", Tag(python, python, f"{LIBC}_{MACHINE}"))
    made = []
    for release in tables.releases.values():
        made += [trees.published(release), trees.patched(release)]
    made += [trees.partly(job.release, job.suite.base_has, without=job.fix.name) for job in cuda.jobs(tables)]
    return list(dict.fromkeys(made))


def parts(site: Path, trees: Iterable[Path]) -> list[Part]:
    """What the bundle consists of."""
    files = files_in(site)
    alone = {FLASH_OPS: files.pop(FLASH_OPS)}
    trees_files = {f"{tree.name}/{name}": path for tree in trees for name, path in files_in(tree).items()}
    return [
        Part("flash-ops", "site", alone, level=22, window_log=31, file=FLASH_OPS),
        Part("site", "site", files, level=19, window_log=27),
        # Near copies of each other: one window over all of them finds that. They change with every patch.
        Part("trees", "trees", trees_files, level=12, window_log=31),
    ]


def files_in(directory: Path) -> dict[str, Path]:
    """The files under a directory, by their names in it, without bytecode."""
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def compress(chosen: Iterable[Part], cache: Path, meter: Meter) -> list[Packed]:
    """Compress the parts, side by side; what was compressed before is taken from the cache."""
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(_compress, part, cache, meter) for part in chosen]
        try:
            return [each.result() for each in running]
        except BaseException:
            meter.stopped = True
            raise


def _compress(part: Part, cache: Path, meter: Meter) -> Packed:
    digest, size = hashlib.sha256(), 0

    def take(data: bytes) -> None:
        nonlocal size
        digest.update(data)
        size += len(data)

    part.write(_Sink(take))
    path = cache / f"{part.name}-{digest.hexdigest()}-{part.level}.{part.window_log}.zst"
    if path.exists():
        meter.say(f"{part.name}: as packed before")
        return Packed(part, path)
    meter.say(f"{part.name}: {size / 1e6:.0f} MB to compress")
    advance = meter.track(part.name, size)
    # Several threads would each see a piece of it alone, and miss what is alike in another's.
    settings = zstandard.ZstdCompressionParameters.from_level(
        part.level, source_size=size, window_log=part.window_log, enable_ldm=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=settings)
    draft = path.with_suffix(".part")
    try:
        with draft.open("wb") as file, compressor.stream_writer(file, size=size, closefd=False) as writer:

            def work_off(data: bytes) -> None:
                writer.write(data)
                advance(len(data))

            part.write(_Sink(work_off))
    except BaseException:
        draft.unlink()
        raise
    draft.replace(path)
    meter.say(f"{part.name}: {path.stat().st_size / 1e6:.1f} MB")
    return Packed(part, path)


def write(
    out: Path, packed: Sequence[Packed], decompressor: Path, slice_size: int, manifest: Mapping[str, Any]
) -> None:
    """Write the bundle; its SHA256SUMS, without which unpack.sh does nothing, come last."""
    out.mkdir(parents=True, exist_ok=True)
    for left in (out / "SHA256SUMS", *out.glob("slice.*")):
        left.unlink(missing_ok=True)
    slices = cut([each.path for each in packed], slice_size, out)
    described, start = [], 0
    for each in packed:
        size = each.path.stat().st_size
        described.append({"name": each.part.name, "into": each.part.into, "start": start, "size": size})
        if each.part.file:
            described[-1]["file"] = each.part.file
        start += size
    complete = {**manifest, "decompressor": decompressor.name, "parts": described, "slices": slices}
    (out / "manifest.json").write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")
    for source in (decompressor, *UNPACKER):
        shutil.copy(source, out / source.name)
    names = [*slices, "manifest.json", *(source.name for source in (decompressor, *UNPACKER))]
    sums = "".join(f"{_sha256(out / name)}  {name}\n" for name in names)
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")


def cut(files: Iterable[Path], slice_size: int, out: Path) -> list[str]:
    """Write the files one after the other, as slices of that size at most, and name those."""
    names: list[str] = []
    target: BinaryIO | None = None
    room = 0
    for path in files:
        with path.open("rb") as source:
            while data := source.read(min(room or slice_size, 1 << 20)):
                if not room:
                    if target:
                        target.close()
                    names.append(f"slice.{len(names):03}")
                    target, room = (out / names[-1]).open("wb"), slice_size
                assert target
                target.write(data)
                room -= len(data)
    if target:
        target.close()
    return names


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _uv(verb: str, *arguments: str | Path) -> None:
    command: list[str | Path] = [sys.executable, "-m", "uv", "--quiet", "pip", verb, *arguments]
    command += ["--python-version", PYTHON, "--python-platform", f"{MACHINE}-{LIBC}"]
    command += ["--only-binary", ":all:"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        raise PatchsetError(f"uv pip {verb}: {result.stderr}: check the network and uv's index")


if __name__ == "__main__":
    sys.exit(main())
