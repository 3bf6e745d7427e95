"""A release is pinned as the entries that are there show it."""

from __future__ import annotations

import functools
import os
import re
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

from .conftest import digest, from_copy


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


def take_out(project: Path, release: str) -> str:
    """Take a release out of the table; returns its entry."""
    table = project / "patches" / "releases.toml"
    text = table.read_text()
    start = text.index(f'[releases."{release}"]\n')
    after = re.search(r'\n(?=\[releases\."[^"]+"\]\n)', text[start:])
    assert after, "not the last one"
    end = start + after.end()
    table.write_text(text[:start] + text[end:])
    return text[start:end]


@pytest.mark.parametrize("release", ["0.5.11", "0.5.12.post1"])
def test_what_was_pinned_by_hand(
    release: str, project: Path, shelf: Path, wheels: Mapping[str, Path], tables: Catalog
) -> None:
    version = Version(release)
    entry = take_out(project, release)
    rest = (project / "patches" / "releases.toml").read_text()
    shutil.rmtree(project / "patches" / release)
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
    ) == replace(expected, patched={})
    if release != "0.5.11":  # which came two days after its date
        assert found.date == expected.date
    assert [path.name for path in (project / "patches" / release).iterdir()] == ["series"]
    assert (project / "patches" / release / "series").read_bytes() == b""
    # The entry is in the form of the others, and all the rest of the file is as it was.
    written = take_out(project, release)
    forms = [
        [line.partition(" ")[0] for line in text.partition('"sglang-')[0].splitlines()]
        for text in (entry, written)
    ]
    assert forms[0] == forms[1]
    assert (project / "patches" / "releases.toml").read_text() == rest


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
    assert "releases.toml says 4ed786a3" in refusal
    table = project / "patches" / "releases.toml"
    wheel.write_bytes(content)
    text = table.read_text()
    table.write_text(text.replace('tree = "de680', 'tree = "00000'))
    assert "0.5.12 has other files" in from_copy(project, "pin", "0.5.12", "--find-links", shelf).refusal()
    table.write_text(text)
    assert digest(project / "patches") == before


def test_a_package_index(project: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that says, as the real one does, which Python a wheel wants."""
    take_out(project, "0.5.12.post1")
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
    take_out(project, "0.5.12.post1")
    shutil.rmtree(project / "patches" / "0.5.12.post1")
    table = project / "patches" / "fixes.toml"
    text = table.read_text()
    table.write_text(text.replace('"==0.5.12.post1" = { state = "upstream" }\n', ""))
    out = from_copy(project, "pin", "0.5.12.post1", "--find-links", shelf).out
    assert "fixes.toml: says nothing of hash-topk-dummy-weights in 0.5.12.post1\n" in out
    wheel = wheels["0.5.12.post1"]
    result = from_copy(project, "status", wheel)
    assert result.code == 2
    assert "fixes.toml says nothing of it in 0.5.12.post1" in result.out
    assert "the series of 0.5.12.post1 has no patch for it" in result.out
    assert from_copy(project, "list").out.splitlines()[1].split()[2:5] == ["not-affected", "patch", "?"]
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
    # A table that somebody wrote in another form is not guessed about.
    take_out(project, "0.5.11")
    table = project / "patches" / "releases.toml"
    table.write_text(table.read_text().replace("[releases.", "  [releases."))
    before = digest(project / "patches")
    refusal = from_copy(project, "pin", "0.5.11", "--find-links", shelf).refusal()
    assert f"{table}: not in the form that an entry can be added to" in refusal
    assert digest(project / "patches") == before
