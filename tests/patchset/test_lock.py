"""What scripts/patch.sh installs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sglang_patchset import catalog

from .conftest import ROOT

LOCK = (ROOT / "scripts" / "requirements.txt").read_text()


def test_every_dependency_is_locked() -> None:
    locked = dict(re.findall(r"^([a-z-]+)==(\S+)", LOCK, re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    needed = [*map(Requirement, catalog.tomllib.loads(project)["project"]["dependencies"])]
    for requirement in needed:
        assert locked[requirement.name] in requirement.specifier
    # And what those need: nothing else is installed.
    assert set(locked) - {each.name for each in needed} == set()
    assert (
        len(re.findall(r"^[a-z-]+==\S+ (?:; .+ )?\\\n    --hash=sha256:[0-9a-f]{64}", LOCK, re.MULTILINE))
        == 3
    )


def test_without_an_index(wheels: Mapping[str, Path], tmp_path: Path) -> None:
    """The README's way, with an index only for the download, in a directory that a shell would read."""
    clone = tmp_path / "a 'clone' of $(touch pwned)*"
    for name in ("python", "patches", "scripts"):
        shutil.copytree(ROOT / name, clone / name)
    links = tmp_path / "the links"
    lock = str(clone / "scripts" / "requirements.txt")
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--dest",
        str(links),
        "--requirement",
        lock,
    ]
    if subprocess.run(download, capture_output=True, check=False).returncode:
        pytest.skip("no package index")
    shutil.copy(wheels["0.5.12"], links)
    script = [str(clone / "scripts" / "patch.sh"), "0.5.12", str(tmp_path / "out")]
    env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PIP_CONFIG_FILE": "/dev/null"}
    env["PIP_INDEX_URL"] = "http://127.0.0.1:1/simple"
    subprocess.run([*script, "--find-links", str(links)], check=True, capture_output=True, env=env)
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name in catalog.load().default.patched
    assert list(tmp_path.rglob("pwned")) == []
    # A package that is not the locked one is none.
    shutil.rmtree(clone / ".venv-tool")
    (packaging,) = links.glob("packaging-*.whl")
    with packaging.open("ab") as file:
        file.write(b"x")
    done = subprocess.run([*script, "--find-links", str(links)], capture_output=True, env=env, check=False)
    assert done.returncode != 0
