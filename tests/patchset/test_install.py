"""Apply and revert in place, in environments that pip made."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import patches, receipt
from sglang_patchset.catalog import Catalog
from sglang_patchset.git import blob_id

from .conftest import PATCHED, ROOT, Command, digest, edit, git, link

DSV4 = "dsv4-expert-distribution"
EPLB = "eplb-double-mapping"  # without which the other one must not be
HASH_TOPK = "srt/layers/moe/hash_topk.py"


def environment(prefix: Path) -> Path:
    """An environment without packages; returns its interpreter."""
    venv.create(prefix, with_pip=False, symlinks=True)
    return prefix / "bin" / "python"


def pip(python: Path, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def tool(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the tool in another interpreter."""
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT / 'python'}:{libraries}"}
    command = [str(python), "-m", "sglang_patchset", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)


def site(prefix: Path) -> Path:
    (found,) = prefix.glob("lib/python3*/site-packages")
    return found


@pytest.fixture(scope="session")
def as_installed(wheels: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the published 0.5.12, as pip installs it; the ones below are hard links to it."""
    prefix = tmp_path_factory.mktemp("environment") / "venv"
    pip(environment(prefix), "install", "--no-deps", "--no-compile", wheels["0.5.12"])
    return prefix


@pytest.fixture
def installed(as_installed: Path, tmp_path: Path) -> Path:
    """An environment with the published 0.5.12."""
    return link(as_installed, tmp_path / "venv")


def test_round_trip_in_an_environment(
    installed: Path, as_installed: Path, command: Command, tables: Catalog
) -> None:
    before = digest(installed)
    assert command("status", installed).code == 1
    assert digest(installed) == before

    assert command("apply", installed).code == 0
    assert command("status", installed).code == 0
    patched = digest(installed)
    changed = {Path(path).name for path in patched if patched[path] != before.get(path)}
    assert {"_patchset.json", "RECORD", "hash_topk.py"} <= changed
    assert digest(as_installed) == before

    # A second time changes nothing, not even a time.
    times = {path: path.stat().st_mtime_ns for path in installed.rglob("*") if path.is_file()}
    assert "nothing to do" in command("apply", installed).out
    assert times == {path: path.stat().st_mtime_ns for path in installed.rglob("*") if path.is_file()}

    # The record tells what is in, one fix taken out again included.
    assert command("revert", installed, EPLB, DSV4).code == 0
    entry = json.loads((site(installed) / receipt.PATH).read_bytes())
    assert entry["release"] == "0.5.12"
    series = patches.load(tables, tables.default).patches
    touched = {path for patch in series if patch.fix != DSV4 for path in patch.files}
    assert entry["files"] == {
        path: blob_id((site(installed) / path).read_bytes()) for path in sorted(touched)
    }

    assert command("apply", installed, EPLB, DSV4).code == 0
    assert digest(installed) == patched
    assert command("revert", installed).code == 0
    assert digest(installed) == before
    assert "nothing to do" in command("revert", installed).out


def test_record_and_pip(installed: Path, command: Command) -> None:
    """pip finds the patched files as RECORD says, and removes the receipt with the rest."""
    assert command("apply", installed).code == 0
    python = installed / "bin" / "python"
    check = (
        "import base64, hashlib, importlib.metadata as m\n"
        "for f in m.files('sglang'):\n"
        "    if f.hash:\n"
        "        data = f.locate().read_bytes()\n"
        "        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()\n"
        "        assert (f.hash.value, f.size) == (digest, len(data)), f\n"
        "print('_patchset.json' in {f.name for f in m.files('sglang')})"
    )
    done = subprocess.run([python, "-c", check], check=True, capture_output=True, text=True, cwd="/")
    assert done.stdout == "True\n"
    pip(python, "uninstall", "--yes", "sglang")
    assert list(site(installed).iterdir()) == []


def test_installed_target_is_never_imported(installed: Path) -> None:
    python = installed / "bin" / "python"
    # An edit elsewhere is left alone, and would show if sglang were imported.
    edit(site(installed) / "sglang" / "__init__.py", "raise SystemExit('imported')")
    before = digest(site(installed))
    assert tool(python, "status").returncode == 1
    assert tool(python, "apply", EPLB, DSV4).returncode == 0
    states = {
        fix["name"]: fix["state"] for fix in json.loads(tool(python, "status", "--json").stdout)["fixes"]
    }
    assert states[DSV4] == "patched"
    assert set(states.values()) == {"patched", "vulnerable", "fixed in part"}
    assert tool(python, "revert", "installed").returncode == 0
    assert digest(site(installed)) == before


def test_status_is_quick(as_installed: Path) -> None:
    python = as_installed / "bin" / "python"
    took = []
    for _ in range(5):
        start = time.perf_counter()
        assert tool(python, "status", "--json").returncode == 1
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5


def test_no_bytecode_of_the_other_side_is_used(tree: Path, command: Command) -> None:
    """Python matches bytecode by its source's size and second of modification."""
    file = tree / "sglang" / HASH_TOPK
    times = [int(file.stat().st_mtime)]
    for verb in ("apply", "revert", "apply"):
        assert command(verb, tree, EPLB, DSV4).code == 0
        times.append(int(file.stat().st_mtime))
    assert times == sorted(set(times))


def test_ways_to_name_an_environment(as_installed: Path, command: Command) -> None:
    package = site(as_installed) / "sglang"
    for target in (as_installed, site(as_installed), package):
        assert json.loads(command("status", target, "--json").out)["target"] == str(package)


@pytest.fixture
def editable(wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> Path:
    """An environment with an editable install of a checkout, as SGLang's container images have it."""
    checkout = tmp_path / "check out"
    assert command("checkout", wheels["0.5.12"], checkout).code == 0
    (checkout / "python" / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "sglang"\nversion = "0.0.0.dev1"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["sglang"]\n'
    )
    python = environment(tmp_path / "venv")
    pip(python, "install", "--no-deps", "--editable", checkout / "python")
    return tmp_path / "venv"


def test_editable_install(editable: Path, command: Command) -> None:
    checkout = editable.parent / "check out"
    package = checkout / "python" / "sglang"
    (package / "_version.py").unlink()
    record = next(site(editable).glob("sglang-*.dist-info/RECORD")).read_bytes()
    before = digest(package)
    for target in (editable, site(editable), checkout, checkout / "python", package):
        report = json.loads(command("status", target, "--json").out)
        # The version is nobody's, so the files themselves tell the release.
        assert (report["target"], report["release"]) == (str(package), "0.5.12")
        assert {fix["state"] for fix in report["fixes"]} == {"patched"}
    python = editable / "bin" / "python"
    assert tool(python, "revert").returncode == 0
    assert tool(python, "status").returncode == 1
    git = ["git", "-C", str(checkout), "diff", "--quiet", "release/0.5.12", "--", "python/sglang"]
    assert subprocess.run(git, check=False).returncode == 0
    assert tool(python, "apply").returncode == 0
    assert command("revert", editable).code == 0
    assert command("apply", editable).code == 0
    (package / "_patchset.json").unlink()
    assert digest(package) == before
    assert next(site(editable).glob("sglang-*.dist-info/RECORD")).read_bytes() == record


def test_the_containers_recipe(editable: Path, command: Command, tables: Catalog) -> None:
    """The line of docs/containers.md, run where an image would run it, over a patch of somebody else."""
    package = editable.parent / "check out" / "python" / "sglang"
    git(package.parents[1], "checkout", "--quiet", "release/0.5.12")
    edit(package / "srt" / "server_args.py", "# theirs")
    before = digest(package)
    text = (ROOT / "docs" / "containers.md").read_text()
    recipes = re.findall(r"^RUN (?:--mount=\S+ )?(.*sglang-patchset apply.*)$", text, re.MULTILINE)
    assert len(recipes) == 2
    pip(editable / "bin" / "python", "install", "pip")
    path = f"{editable / 'bin'}:{os.environ['PATH']}"
    for recipe in recipes:
        line = recipe.replace("/patchset", shlex.quote(str(ROOT))).replace(" /sglang", " ../'check out'")
        done = subprocess.run(
            ["bash", "-c", f"{line} && sglang-patchset status"],
            cwd=editable,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        # Once by `apply` and once by `status`.
        twice = 2 * len(patches.load(tables, tables.default).patches)
        assert (done.returncode, len(re.findall(r" patched\b", done.stdout))) == (0, twice), done.stderr
    assert digest(package) != before
    assert command("revert", editable).code == 0
    assert digest(package) == before


def test_two_environments_of_one_prefix(tree: Path, command: Command, tmp_path: Path) -> None:
    for python in ("python3.11", "python3.12"):
        link(tree, tmp_path / "venv" / "lib" / python / "site-packages")
    assert "more than one SGLang" in command("status", tmp_path / "venv").refusal()


def test_every_pinned_release_has_an_answer(wheels: Mapping[str, Path], command: Command) -> None:
    for release, wheel in wheels.items():
        result = command("status", wheel, "--json")
        states = {fix["state"] for fix in json.loads(result.out)["fixes"]}
        assert "unknown" not in states
        assert result.code == ("vulnerable" in states) == (release in PATCHED)


def test_versions_that_are_not_pinned(tree: Path, command: Command, tables: Catalog) -> None:
    series = patches.load(tables, tables.releases[Version("0.5.12")])
    for path in series.files:
        edit(tree / path, "# as some other release has it")
    for version, code, states in [
        ("0.5.16", 1, {"unknown", "vulnerable"}),
        ("0.5.10", 2, {"unknown"}),
        ("99.0", 2, {"unknown"}),
        ("0.5.14.dev12+gabc", 2, {"unknown"}),
        ("0.5.16+local", 2, {"unknown"}),
    ]:
        file = tree / "sglang" / "_version.py"
        file.unlink()
        file.write_text(f"__version__ = version = '{version}'\n")
        result = command("status", tree, "--json")
        report = json.loads(result.out)
        assert (result.code, report["release"]) == (code, None)
        assert {fix["state"] for fix in report["fixes"]} == states
        assert all(version in fix["detail"] for fix in report["fixes"]) == (states == {"unknown"})
        assert not any(fix["patch"] for fix in report["fixes"])
        before = digest(tree)
        assert f"SGLang {version}, not a pinned release" in command("apply", tree).refusal()
        assert digest(tree) == before


def test_a_later_version_with_a_vulnerable_file(tree: Path, command: Command) -> None:
    for file in (tree / "sglang" / HASH_TOPK, tree / "sglang" / "srt" / "server_args.py"):
        edit(file, "# mine")
    (tree / "sglang" / "_version.py").unlink()
    (tree / "sglang" / "_version.py").write_text("__version__ = version = '0.5.16'\n")
    result = command("status", tree, "--json")
    fix = next(fix for fix in json.loads(result.out)["fixes"] if fix["name"] == "swa-graph-padding")
    assert (result.code, fix["state"]) == (1, "unknown")
    assert "the version says 0.5.16, but sglang/srt/model_executor/" in fix["detail"]


def test_a_fix_that_is_in_has_what_it_leaves_open_alone(tree: Path, command: Command) -> None:
    remark, left_open = (
        "servers with breakable CUDA graphs fail at start",
        "left open since 0.5.11: with two-batch overlap",
    )
    before = command("status", tree).out
    assert remark in before
    assert left_open in before
    after = command("apply", tree).out
    assert remark not in after
    assert left_open in after


def test_a_wrong_version_does_not_hide_a_pinned_release(tree: Path, command: Command) -> None:
    """A checkout's _version.py may be that of the commit that was installed, long ago."""
    (tree / "sglang" / "_version.py").unlink()
    (tree / "sglang" / "_version.py").write_text("__version__ = version = '0.5.16'\n")
    report = json.loads(command("status", tree, "--json").out)
    assert (report["version"], report["release"]) == ("0.5.16", "0.5.12")
    assert {fix["state"] for fix in report["fixes"]} == {"vulnerable", "fixed in part"}


def test_json_has_these_keys(tree: Path, command: Command, tables: Catalog) -> None:
    report = json.loads(command("status", tree, "--json").out)
    assert list(report) == ["target", "version", "release", "wheel", "fixes"]
    assert [fix["name"] for fix in report["fixes"]] == list(tables.fixes)
    for fix in report["fixes"]:
        assert list(fix)[:4] == ["name", "state", "detail", "patch"]
        assert list(fix)[4:] == ["title", "upstream_pr", "symptom", "when", "log", "needs"]
        assert isinstance(fix["upstream_pr"], int)


def test_the_record_of_an_interrupted_upgrade(tree: Path, command: Command) -> None:
    """Of two dist-infos, the one of the package's own version is the package's."""
    ours = tree / "sglang-0.5.12.dist-info" / "RECORD"
    other = tree / "sglang-0.5.11.dist-info" / "RECORD"
    other.parent.mkdir()
    other.write_bytes(ours.read_bytes())
    before = digest(tree)
    assert command("apply", tree).code == 0
    assert receipt.PATH in ours.read_text()
    assert receipt.PATH not in other.read_text()
    assert command("revert", tree).code == 0
    assert digest(tree) == before
    ours.parent.rename(tree / "sglang-0.5.10.dist-info")
    assert "the dist-info of SGLang 0.5.10 and 0.5.11 lie in it" in command("apply", tree).refusal()


def test_a_record_with_blank_lines(tree: Path, command: Command) -> None:
    edit(tree / "sglang-0.5.12.dist-info" / "RECORD", "\n")
    before = digest(tree)
    assert command("apply", tree).code == 0
    assert command("revert", tree).code == 0
    assert digest(tree) == before


def test_damaged_metadata(tree: Path, command: Command) -> None:
    info = tree / "sglang-0.5.12.dist-info"
    for text in (b"{", b"[]", b'{"url": 1}', b"\xff"):
        (info / "direct_url.json").write_bytes(text)
        assert command("status", tree).code == 1
        # An editable install has nothing but its dist-info there.
        (tree / "sglang").rename(tree / "elsewhere")
        assert "no SGLang in it" in command("status", tree).refusal()
        (tree / "elsewhere").rename(tree / "sglang")
    version = tree / "sglang" / "_version.py"
    version.unlink()
    version.write_bytes(b"\xff\n")
    assert "SGLang 0.5.12 " in command("status", tree).out
    (info / "RECORD").unlink()
    (info / "RECORD").write_bytes(b"sglang/\xff.py,,\n")
    before = digest(tree)
    assert f"{info / 'RECORD'}: damaged " in command("apply", tree).refusal()
    assert digest(tree) == before
