"""A release is pinned as the entries that are there show it."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import catalog
from sglang_patchset.catalog import Catalog

from .conftest import change, digest, from_copy


@pytest.fixture
def shelf(wheels: Mapping[str, Path], tmp_path: Path) -> Path:
    """A directory of wheels: of each release the real one, and the same under another machine's name."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for wheel in wheels.values():
        os.link(wheel, shelf / wheel.name)
        name, version, *_ = wheel.name.split("-")
        shutil.copy(wheel, shelf / f"{name}-{version}-cp313-cp313-macosx_14_0_arm64.whl")
    return shelf


@pytest.mark.parametrize("release", ["0.5.11", "0.5.12.post1"])
def test_what_was_pinned_by_hand(
    release: str, project: Path, shelf: Path, wheels: Mapping[str, Path], tables: Catalog
) -> None:
    version = Version(release)
    directory = project / "patches" / release
    before = {file.name: file.read_text() for file in directory.iterdir()}
    others = {
        name: entry
        for name, entry in digest(project / "patches").items()
        if not name.startswith(f"{release}/")
    }
    shutil.rmtree(directory)
    result = from_copy(project, "pin", release, "--find-links", shelf)
    assert (result.code, result.out.splitlines()[0]) == (
        0,
        f"{release}: pinned, 2 wheels for Python 3.11, 3.13",
    )
    after = catalog.load(project / "patches")
    expected, name = tables.releases[version], wheels[release].name
    assert list(after.releases) == list(tables.releases)
    found = after.releases[version]
    assert found.wheels[name] == expected.wheels[name]
    assert replace(
        found,
        date=expected.date,
        patchset=expected.patchset,
        python=expected.python,
        wheels=expected.wheels,
    ) == replace(expected, patched={}, fixes=())
    if release != "0.5.11":  # which came two days after its date
        assert found.date == expected.date
    assert {file.name for file in directory.iterdir()} == {"release.toml", "series", "wheels.sha256"}
    assert (directory / "series").read_bytes() == b""
    # In the form of the others, whose files are as they were.
    forms = [
        [line.partition(" ")[0] for line in text.splitlines()]
        for text in (before["release.toml"], (directory / "release.toml").read_text())
    ]
    assert forms[0] == forms[1]
    after_all = digest(project / "patches")
    assert others.items() <= after_all.items()


def test_a_pinned_release_is_looked_at_again(project: Path, shelf: Path) -> None:
    for file in shelf.glob("*macosx*"):
        file.unlink()
    before = digest(project / "patches")
    result = from_copy(project, "pin", "0.5.12", "--find-links", shelf)
    assert (result.code, result.out) == (
        0,
        "0.5.12: already pinned, 8 wheels for Python 3.10, 3.11, 3.12, 3.13\n",
    )
    (wheel,) = shelf.glob("sglang-0.5.12-*")
    content = wheel.read_bytes()
    wheel.unlink()
    wheel.write_bytes(content + b"\0")
    refusal = from_copy(project, "pin", "0.5.12", "--find-links", shelf).refusal()
    assert f"{wheel.name}: pip's index has it with the sha256 " in refusal
    assert "wheels.sha256 says 4ed786a3" in refusal
    table = project / "patches" / "0.5.12" / "release.toml"
    wheel.write_bytes(content)
    text = table.read_text()
    table.write_text(text.replace('tree = "de680', 'tree = "00000'))
    assert "0.5.12: has other files" in from_copy(project, "pin", "0.5.12", "--find-links", shelf).refusal()
    table.write_text(text)
    assert digest(project / "patches") == before


def test_a_package_index(project: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that says, as the real one does, which Python a wheel wants."""
    shutil.rmtree(project / "patches" / "0.5.12.post1")
    page = tmp_path / "index" / "simple" / "sglang"
    page.mkdir(parents=True)
    (page / "index.html").write_text(
        "".join(f'<a href="{wheel.name}">{wheel.name}</a>\n' for wheel in shelf.iterdir())
    )
    for wheel in shelf.iterdir():
        os.link(wheel, page / wheel.name)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/simple/"
        for name, value in (("INDEX_URL", address), ("EXTRA_INDEX_URL", ""), ("FIND_LINKS", "")):
            monkeypatch.setenv(f"PIP_{name}", value)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        result = from_copy(project, "pin", "0.5.12.post1")
        assert result.out.startswith("0.5.12.post1: pinned, 2 wheels for Python 3.11, 3.13\n")
        before = digest(project / "patches")
        refusal = from_copy(project, "pin", "0.5.99").refusal()
        assert "sglang==0.5.99: pip finds no wheel of it: check the version" in refusal
    finally:
        server.shutdown()
        server.server_close()
    assert "pip cannot reach " in from_copy(project, "pin", "0.5.99").refusal()
    assert digest(project / "patches") == before


def test_a_release_that_nobody_has_looked_at(
    project: Path, shelf: Path, wheels: Mapping[str, Path], tree: Path
) -> None:
    """Between `pin` and the first patch, nothing is claimed of the release."""
    shutil.rmtree(project / "patches" / "0.5.12.post1")
    table = project / "patches" / "fixes" / "hash-topk-dummy-weights.toml"
    change(table, '">=0.5.12.post1,<=0.5.23" =', '">=0.5.13,<=0.5.23" =')
    out = from_copy(project, "pin", "0.5.12.post1", "--find-links", shelf).out
    assert "hash-topk-dummy-weights.toml: says nothing of 0.5.12.post1, whose series lacks it\n" in out
    wheel = wheels["0.5.12.post1"]
    result = from_copy(project, "status", wheel)
    assert result.code == 2
    assert result.out.count("nothing is known of it in 0.5.12.post1") > 3
    assert "SGLang 0.5.12.post1 has no patch set" in from_copy(project, "apply", wheel).refusal()
    # An empty series fits nothing.
    (tree / "sglang" / "_version.py").unlink()
    shutil.rmtree(tree / "sglang-0.5.12.dist-info")
    assert "SGLang (no version) in" in from_copy(project, "status", tree).out
    assert from_copy(project, "status", tree).code == 1


def test_what_cannot_be_pinned(project: Path, shelf: Path) -> None:
    before = digest(project / "patches")
    assert "main: not a version" in from_copy(project, "pin", "main").refusal()
    refusal = from_copy(project, "pin", "0.5.99", "--find-links", shelf).refusal()
    assert "sglang==0.5.99: pip finds no wheel of it: check the version" in refusal
    assert digest(project / "patches") == before
    (project / "tests" / "regression").rename(project / "elsewhere")
    assert "work in a clone" in from_copy(project, "pin", "0.5.12").refusal()
    (project / "elsewhere").rename(project / "tests" / "regression")
