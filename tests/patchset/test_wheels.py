"""A patched wheel and the way back."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from wheel.wheelfile import WheelFile

from sglang_patchset import patches, receipt, releases, targets
from sglang_patchset.catalog import Catalog, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.wheels import patch

from .conftest import PATCHED, ROOT, Command
from .test_install import environment, pip, site, tool


def members(wheel: Path) -> dict[str, tuple[bytes, int, tuple[int, ...]]]:
    """Each member's bytes, mode and time, each checked against RECORD as it is read."""
    with WheelFile(wheel) as archive:
        return {
            info.filename: (archive.read(info), info.external_attr, info.date_time)
            for info in archive.infolist()
        }


@pytest.fixture(scope="session")
def built(wheels: Mapping[str, Path], tables: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched wheel of 0.5.12."""
    target = targets.find(str(wheels["0.5.12"]))
    assert isinstance(target, targets.Wheel)
    return patch(tables, target, tmp_path_factory.mktemp("built"))


def rest(tables: Catalog, release: str) -> int:
    """The exit code of `status` where all patches are in: 2 where upstream left what none of them repairs."""
    cells = [fix.cell(Version(release)) for fix in tables.fixes.values()]
    return 2 if any(cell and cell.state is State.IN_PART and not cell.patch for cell in cells) else 0


@pytest.mark.parametrize("release", PATCHED)
def test_round_trip(
    release: str, wheels: Mapping[str, Path], tables: Catalog, command: Command, tmp_path: Path
) -> None:
    assert command("wheel", wheels[release], tmp_path).code == 0
    (patched,) = tmp_path.glob("*.whl")
    version = f"{release}+patchset.1"
    assert str(parse_wheel_filename(patched.name)[1]) == version
    before, after = members(wheels[release]), members(patched)
    old, new = f"sglang-{release}.dist-info/", f"sglang-{version}.dist-info/"
    touched = patches.load(tables, tables.releases[Version(release)]).files
    changed = {*touched, f"{new}METADATA", f"{new}RECORD", "sglang/_version.py"}
    assert {path.replace(old, new) for path in before} | {receipt.PATH} == set(after)
    for path, member in before.items():
        assert (member == after[path.replace(old, new)]) == (path.replace(old, new) not in changed)

    metadata = [
        email.message_from_bytes(data) for data in (before[f"{old}METADATA"][0], after[f"{new}METADATA"][0])
    ]
    assert metadata[1]["Version"] == version
    metadata[0].replace_header("Version", version)
    assert metadata[0].as_bytes() == metadata[1].as_bytes()
    scope: dict[str, object] = {}
    exec(after["sglang/_version.py"][0], scope)
    assert scope["__version__"] == scope["version"] == version
    post = ["post1"] if "post1" in release else []
    assert scope["__version_tuple__"] == (0, 5, int(release.split(".")[2]), *post, "patchset.1")

    assert command("status", patched).code == rest(tables, release)
    assert command("revert", patched).code == 0
    plain = tmp_path / wheels[release].name
    assert members(plain) == before
    assert command("status", plain).code == 1


def test_apply_writes_beside_and_revert_keeps_what_lies_there(
    wheels: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    published = Path(shutil.copy(wheels["0.5.12"], tmp_path))
    bytes_before = published.read_bytes()
    assert command("apply", published).code == 0
    (patched,) = tmp_path.glob("*patchset*.whl")
    again = patched.read_bytes()
    assert command("apply", patched).code == 0
    assert patched.read_bytes() == again
    inode = published.stat().st_ino
    assert command("revert", patched).code == 0
    assert (published.stat().st_ino, published.read_bytes()) == (inode, bytes_before)
    assert sorted(tmp_path.iterdir()) == sorted([published, patched])


def test_revert_can_be_repeated(built: Path, command: Command, tmp_path: Path) -> None:
    """What it wrote is not the published file to the byte, which nobody can compress once more alike."""
    patched = Path(shutil.copy(built, tmp_path))
    assert command("revert", patched).code == 0
    (plain,) = set(tmp_path.iterdir()) - {patched}
    before = plain.stat().st_ino, plain.read_bytes()
    assert command("revert", patched).code == 0
    assert (plain.stat().st_ino, plain.read_bytes()) == before
    plain.write_bytes(b"somebody's")
    assert f"{plain}: neither the published wheel nor made by this" in command("revert", patched).refusal()
    assert plain.read_bytes() == b"somebody's"
    assert set(tmp_path.iterdir()) == {patched, plain}


@pytest.mark.parametrize(
    ("zone", "epoch", "umask", "directory"),
    [("Asia/Tokyo", "0", 0o077, "one"), ("America/St_Johns", "2000000000", 0o000, "two/with a blank")],
)
def test_same_bytes_every_time(
    zone: str, epoch: str, umask: int, directory: str, wheels: Mapping[str, Path], built: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copy(wheels["0.5.12"], tmp_path))
    os.utime(source, (int(epoch), int(epoch)))
    (tmp_path / directory).mkdir(parents=True)
    command = [sys.executable, "-m", "sglang_patchset", "wheel", str(source), "out"]
    env = {"PATH": os.environ["PATH"], "TZ": zone, "SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": epoch[:9]}
    env["PYTHONPATH"] = str(ROOT / "python")
    cwd = tmp_path / directory
    subprocess.run(command, check=True, capture_output=True, env=env, umask=umask, cwd=cwd)
    (again,) = (cwd / "out").iterdir()
    assert (again.name, again.read_bytes()) == (built.name, built.read_bytes())


def test_same_bytes_by_every_python(wheels: Mapping[str, Path], built: Path, tmp_path: Path) -> None:
    """And by every zlib that those are linked to."""
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT / 'python'}:{libraries}"}
    others = [shutil.which(f"python3.{minor}") for minor in range(10, 16)]
    others += sorted(map(str, Path.home().glob(".pyenv/versions/3.1*/bin/python")))
    tried = 0
    for python in filter(None, others):
        needs = [
            python,
            "-c",
            "import packaging; import sys; sys.version_info < (3, 11) and __import__('tomli')",
        ]
        if subprocess.run(needs, capture_output=True, env=env, check=False).returncode:
            continue
        out = tmp_path / str(tried)
        command = [python, "-m", "sglang_patchset", "wheel", wheels["0.5.12"], out]
        subprocess.run(command, check=True, capture_output=True, env=env)
        assert [path.read_bytes() for path in out.iterdir()] == [built.read_bytes()]
        tried += 1
    if not tried:
        pytest.skip("no other Python from 3.10 on")


def test_the_patched_wheels_are_listed(
    wheels: Mapping[str, Path], tables: Catalog, command: Command, tmp_path: Path
) -> None:
    """Those of this interpreter are made; scripts/list_patched.py makes them all."""
    assert [str(version) for version, release in tables.releases.items() if release.patched] == [*PATCHED]
    for release in map(tables.releases.__getitem__, map(Version, PATCHED)):
        names = [
            name.replace(f"-{release.version}-", f"-{release.patched_version}-") for name in release.wheels
        ]
        assert sorted(release.patched) == sorted(names)
        published = wheels[str(release.version)]
        assert command("wheel", published, tmp_path).code == 0
        made = tmp_path / names[list(release.wheels).index(published.name)]
        assert releases.sha256(made) == release.patched[made.name]
        for wheel, state, words in (
            (published, "published", "the published wheel, by its sha256"),
            (made, "patched", "the patched wheel that patched.sha256 lists, by its sha256"),
        ):
            assert json.loads(command("status", wheel, "--json").out)["wheel"] == state
            assert words in command("status", wheel).out
    with zipfile.ZipFile(made, "a") as archive:
        archive.comment = b"x"
    result = command("status", made)
    assert result.code == rest(tables, PATCHED[-1])
    assert "its sha256 is none that is listed" in result.out


def test_patched_wheels_are_listed_by_a_script(wheels: Mapping[str, Path], project: Path) -> None:
    shutil.copytree(ROOT / "scripts", project / "scripts")
    shelf = project / "shelf"
    shelf.mkdir()
    expected = {}
    for release, wheel in wheels.items():
        shutil.copy(wheel, shelf)
        tag = wheel.name.split("-", 2)[2]
        for name in ("wheels.sha256", "patched.sha256"):
            listed = project / "patches" / release / name
            lines = listed.read_text().splitlines(keepends=True)
            expected[listed] = "".join(line for line in lines if line.rstrip().endswith(tag))
            listed.write_text(expected[listed])
    for away in (False, True):
        for listed in expected:
            if away and listed.name == "patched.sha256":
                listed.unlink()
        env = {**os.environ, "PYTHONPATH": str(project / "python")}
        script = [sys.executable, str(project / "scripts" / "list_patched.py"), str(shelf)]
        subprocess.run(script, check=True, capture_output=True, env=env)
        assert {listed: listed.read_text() for listed in expected} == expected
    # They are what `sha256sum --check` reads.
    for listed in expected:
        if listed.name == "wheels.sha256":
            check = ["sha256sum", "--check", "--quiet", str(listed)]
            assert subprocess.run(check, cwd=shelf, capture_output=True, check=False).returncode == 0


def test_pip_takes_the_patched_wheel_over_the_published_one(
    wheels: Mapping[str, Path], built: Path, tmp_path: Path, tables: Catalog
) -> None:
    shutil.copy(wheels["0.5.12"], tmp_path)
    shutil.copy(built, tmp_path)
    python = environment(tmp_path / "venv")
    pip(
        python,
        "install",
        "--no-deps",
        "--no-compile",
        "--no-index",
        "--find-links",
        tmp_path,
        "sglang==0.5.12",
    )
    assert [path.name for path in site(tmp_path / "venv").glob("*.dist-info")] == [
        "sglang-0.5.12+patchset.1.dist-info"
    ]
    status = tool(python, "status")
    series = patches.load(tables, tables.default)
    assert (status.returncode, status.stdout.count(" patched")) == (0, len(series.patches))
    # Taken out in place, the files are the release's; applied again, they are the wheel's.
    assert tool(python, "revert").returncode == 0
    assert tool(python, "status").returncode == 1
    assert tool(python, "apply").returncode == 0
    pip(python, "uninstall", "--yes", "sglang")
    assert list(site(tmp_path / "venv").iterdir()) == []


def test_release_by_pip(wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    shutil.copy(wheels["0.5.12"], links)
    result = command("wheel", "0.5.12", tmp_path / "out", "--find-links", links)
    assert result.code == 0
    assert result.out.endswith(f"{next((tmp_path / 'out').iterdir())}\n")


def test_tampered_wheels_are_refused(wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    tampered = Path(shutil.copy(wheels["0.5.12"], tmp_path))
    with zipfile.ZipFile(tampered, "a") as archive:
        archive.writestr("sglang/extra.py", "")
    for arguments in (
        ("apply", tampered),
        ("wheel", tampered, tmp_path),
        ("checkout", tampered, tmp_path / "co"),
    ):
        assert "its sha256 is" in command(*arguments).refusal()
    assert (
        "not the published wheel"
        in command("wheel", "0.5.12", tmp_path / "out", "--find-links", tmp_path).refusal()
    )
    assert list(tmp_path.iterdir()) == [tampered]


@pytest.mark.parametrize("member", ["../evil.py", "/evil.py", "sglang/../../evil.py", "evil/__init__.py"])
def test_members_outside_of_sglang_are_refused(
    member: str, built: Path, command: Command, tmp_path: Path
) -> None:
    patched = Path(shutil.copy(built, tmp_path))
    with zipfile.ZipFile(patched, "a") as archive:
        archive.writestr(member, "")
    assert f"has the member {member}" in command("revert", patched).refusal()
    assert list(tmp_path.iterdir()) == [patched]


def test_a_changed_member_of_a_patched_wheel_is_refused(
    built: Path, command: Command, tmp_path: Path
) -> None:
    changed = tmp_path / built.name
    with zipfile.ZipFile(built) as source, zipfile.ZipFile(changed, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info, data + b"#" if info.filename == "sglang/utils.py" else data)
    assert "Hash mismatch for file 'sglang/utils.py'" in command("revert", changed).refusal()
    assert list(tmp_path.iterdir()) == [changed]


@pytest.mark.parametrize("damage", ["encrypted", "compression", "RECORD", "METADATA"])
def test_a_damaged_wheel_is_refused(damage: str, tmp_path: Path) -> None:
    wheel = tmp_path / "sglang-0.5.12-py3-none-any.whl"
    info = "sglang-0.5.12.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/RECORD", "one,column\n" if damage == "RECORD" else f"{info}/RECORD,,\n")
    # The first member's header in the archive's directory: its flags and its compression.
    data = bytearray(wheel.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 8] |= damage == "encrypted"
    data[start + 10] = 99 if damage == "compression" else 0
    wheel.write_bytes(data)
    with pytest.raises(PatchsetError, match="damaged"), releases.opened(wheel) as opened:
        opened.read(f"{info}/METADATA")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.5.16", "not a pinned release: choose from 0.5.11, 0.5.12, 0.5.12.post1, 0.5.13"),
        ("latest", "not a pinned release"),
        ("nowhere.whl", "no such file"),
    ],
)
def test_what_is_no_release(name: str, message: str, command: Command, tmp_path: Path) -> None:
    assert message in command("wheel", name, tmp_path / "out").refusal()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_wheel(command: Command, tmp_path: Path, wheels: Mapping[str, Path]) -> None:
    for name in ("other-1.0-py3-none-any.whl", "sglang.whl", wheels["0.5.12"].name):
        (tmp_path / name).write_bytes(b"")
        command("apply", tmp_path / name).refusal()
    refusal = command("wheel", "0.5.12", "--find-links", ROOT / "tests").refusal()
    assert refusal.startswith(f"sglang-patchset: {ROOT / 'tests'}: no wheel of sglang==0.5.12 that fits (")


@pytest.mark.parametrize("status", [401, 403, 404, None])
def test_an_index_that_refuses(
    status: int | None, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status or 500)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        port = server.server_port if status else 1
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        refusal = command("wheel", "0.5.12", tmp_path / "out").refusal()
        server.shutdown()
    if status == 404:
        assert "pip finds no wheel" in refusal
    else:
        assert "pip cannot reach http://127.0.0.1:" in refusal
        assert str(status or "connection error") in refusal


def test_single_fixes_are_for_installed_packages(wheels: Mapping[str, Path], command: Command) -> None:
    refusal = command("apply", wheels["0.5.12"], "swa-graph-padding").refusal()
    assert "a patched wheel has the whole series" in refusal
