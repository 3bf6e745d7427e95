#!/usr/bin/env python3
"""Completes an environment for the GPU regression tests with what is on no package index:

    .venv-gpu/bin/python scripts/cuda_environment.py [SITE_PACKAGES]

DeepSeek-V4 in SGLang 0.5.12 imports a package flash_mla. sglang-kernel 0.4.3 has its functions, for the same
torch: two of its files replace those of 0.4.2.post2, and a package of that name re-exports them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

_KERNEL = ("sglang-kernel==0.4.3", "636a2b05fdef7cc0f7d9af98a6eec0d3470845d6ea32251c52d359d877893c87")
_REPLACED = ("sgl_kernel/flash_mla.py", "sgl_kernel/flashmla_ops.abi3.so")
_PACKAGE = {
    "__init__.py": "from sgl_kernel.flash_mla import *  # noqa: F403\n",
    "flash_mla_interface.py": "from sgl_kernel.flash_mla import FlashMLASchedMeta  # noqa: F401\n",
}


class CompletionError(Exception):
    """Says in one line what is wrong and what to do next."""


def complete(site: Path) -> None:
    """Add what `site` lacks; nothing, where it is complete.

    Raises:
        CompletionError: `site` has no sglang-kernel, or pip cannot get the other one.
    """
    package = site / "flash_mla"
    if package.is_dir():
        return
    if not (site / "sgl_kernel").is_dir():
        raise CompletionError(
            f"{site}: has no sgl_kernel: install tests/regression/requirements-cuda.txt there first"
        )
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(*_KERNEL, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            for name in _REPLACED:
                _replace(site / name, archive.read(name))
    # The package is what tells a complete environment, so it appears last and whole.
    draft = Path(tempfile.mkdtemp(dir=site))
    for name, text in _PACKAGE.items():
        (draft / name).write_text(text, encoding="utf-8")
    draft.chmod(0o755)
    os.rename(draft, package)


def download(requirement: str, sha256: str, into: Path, python: str = "3.12") -> Path:
    """A wheel for Linux x86_64 and that Python, by way of pip.

    Raises:
        CompletionError: pip cannot get it, or it is another file than the hash says.
    """
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        # pip takes hashes from a file alone.
        listed = Path(scratch, "requirements.txt")
        listed.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-input", "--no-deps", "--only-binary=:all:", "--python-version", python]
        for platform in ("manylinux2014_x86_64", "manylinux_2_34_x86_64"):
            command += ["--platform", platform]
        command += ["--dest", scratch, "--requirement", str(listed)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
            raise CompletionError(
                f"{requirement}: pip cannot get it ({errors[-1][7:] if errors else 'no message'}): "
                "check the network and pip's index"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        return wheel.replace(into / wheel.name)


def _replace(file: Path, content: bytes) -> None:
    # The installed file may be a hard link into an installer's cache: that one has to stay as it is.
    draft = file.with_name(f".{file.name}")
    draft.write_bytes(content)
    draft.chmod(0o644)
    os.replace(draft, file)


def main(arguments: list[str]) -> int:
    """Complete the directory that is named, or this Python's own."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: cuda_environment.py [SITE_PACKAGES]", file=sys.stderr)
        return 2
    try:
        complete(Path(arguments[0] if arguments else sysconfig.get_path("platlib")))
    except (CompletionError, OSError) as error:
        print(f"cuda_environment.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
