"""What a result rests on: what may change while it holds, and what takes exactly its rows."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import catalog, patches, targets
from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import cuda, evidence, pages, results
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Job, Outcome
from sglang_patchset.proof.results import Run
from sglang_patchset.wheels import patch

from .conftest import ROOT, change, digest, edit, from_copy

# A row is a fix in a release.
Row = tuple[str, str]

HEADER = {"gpu": "Made Up", "gpus": 4, "driver": "580.1", "versions": {"torch": "2.11.0"}, "cold": True}
DSA, DSV4, EPLB = "dsa-index-sharing", "dsv4-expert-distribution", "eplb-double-mapping"
BUFFER = "routed-experts-dp-buffer"
HASH, REUSE, SWA = "hash-topk-dummy-weights", "mtp-index-reuse", "swa-graph-padding"
DATE = "2026-01-02T03:04:05+00:00"


def verdict(job: Job, **values: object) -> Verdict:
    """What should come of a job."""
    found = Verdict(
        str(job.release.version),
        *(job.fix.name, job.suite.test, job.tree, job.expected, job.expected),
        seconds=1.5,
        signatures=dict.fromkeys(job.reds, "the words"),
        measured={},
        durations={"Test::test": 1.5},
        passed=1,
    )
    return dataclasses.replace(found, **values)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What holds, and what no longer does, and why."""

    seen: set[Row]
    gone: dict[Row, list[str]]

    @classmethod
    def of(cls, project: Path) -> Rows:
        seen, gone = results._rows(load(project))
        return cls(
            {(each.fix, each.release) for each in seen},
            {(each.fix, each.release): list(each.why) for each in gone},
        )


def load(project: Path) -> Catalog:
    tables = catalog.load(project / "patches")
    assert not tables.damaged
    return tables


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[Row]]:
    """A copy of this project in which everything was just seen on a machine, and every row."""
    project = tmp_path_factory.mktemp("made") / "project"
    for name in ("python", "patches", "tests/regression"):
        shutil.copytree(ROOT / name, project / name)
    tables = load(project)
    jobs = cuda.jobs(tables)
    run = Run.start(tables, project / "results", "gpu-Made-Up", HEADER)
    run.add([(job, verdict(job)) for job in jobs])
    run.finish(60)
    every = {(job.fix.name, str(job.release.version)) for job in jobs}
    assert Rows.of(project) == Rows(every, {})
    return project, every


@pytest.fixture
def seen(made: tuple[Path, set[Row]], tmp_path: Path) -> Path:
    """A copy of that one."""
    return Path(shutil.copytree(made[0], tmp_path / "seen"))


@pytest.fixture
def every(made: tuple[Path, set[Row]]) -> set[Row]:
    """Every row of it."""
    return made[1]


def change_hunk(project: Path, release: str, fix: str, path: str) -> set[str]:
    """Add a word to a line that a patch adds to a file; returns the fixes whose patches are other ones then.

    As after `refresh`, the blob ids from there on are others too.
    """
    directory = project / "patches" / release
    before = {file.stem: file.read_bytes() for file in directory.glob("*.patch")}
    series = patches.load(load(project), load(project).release(release))
    file = directory / f"{fix}.patch"
    head, begin, rest = file.read_text().partition(f"\n+++ b/python/{path}\n")
    assert begin
    rest, count = re.subn(r"^\+(.*\S.*)$", r"+\1  # changed", rest, count=1, flags=re.MULTILINE)
    assert count == 1
    file.write_text(head + begin + rest)
    later = series.files[path][[each.fix for each in series.files[path]].index(fix) :]
    for old in {each.files[path][1] for each in later}:
        for each in later:
            mail = directory / f"{each.fix}.patch"
            mail.write_text(mail.read_text().replace(old, old[::-1]))
    again = patches.load(load(project), load(project).release(release))
    assert again.published_id(path) == series.published_id(path)
    assert again.patched_id(path) != series.patched_id(path)
    return {name for name, content in before.items() if (directory / f"{name}.patch").read_bytes() != content}


def add_release(project: Path, like: str, version: str) -> None:
    """A release without patches, which is another one's twin."""
    old, new = (project / "patches" / each for each in (like, version))
    new.mkdir()
    (new / "series").write_text("")
    shutil.copy(old / "release.toml", new)
    wheels = (old / "wheels.sha256").read_text()
    (new / "wheels.sha256").write_text(wheels.replace(f"sglang-{like}-", f"sglang-{version}-"))


def patched_wheel(tables: Catalog, wheel: Path, out: Path) -> tuple[str, bytes]:
    target = targets.find(str(wheel))
    assert isinstance(target, targets.Wheel)
    made = patch(tables, target, out)
    return made.name, made.read_bytes()


def test_a_release_and_sentences_change_nothing_else(
    seen: Path, wheels: Mapping[str, Path], tmp_path: Path
) -> None:
    """Neither another file, nor a row of what was seen, nor a byte of a patched wheel."""
    was_seen, page = results.seen(load(seen)), pages.evidence(load(seen))
    wheel = patched_wheel(load(seen), wheels["0.5.12"], tmp_path / "before")
    before = digest(seen)

    add_release(seen, "0.5.14", "0.5.99")
    fix = seen / "patches" / "fixes" / f"{DSA}.toml"
    change(fix, 'symptom = "', 'symptom = "A sentence more. ')
    change(fix, "[releases]\n", '[releases]\n"==0.5.99" = "upstream"\n')
    mail = seen / "patches" / "0.5.12" / f"{DSA}.patch"
    header, blank, rest = mail.read_text().partition("\n\n")
    mail.write_text(f"{header}{blank}A sentence more.\n\n{rest}")
    table = seen / "tests" / "regression" / DSA / "expected.toml"
    table.write_text(f"# A comment.\n{table.read_text()}\n# Another.\n")

    after = digest(seen)
    ours = {f"patches/0.5.99{name}" for name in ("", "/release.toml", "/series", "/wheels.sha256")}
    theirs = {str(file.relative_to(seen)) for file in (fix, mail, table)}
    assert after.keys() - before.keys() == ours
    assert {name for name in before if after.get(name) != before[name]} == theirs
    tables = load(seen)
    assert Version("0.5.99") in tables.releases
    assert tables.fixes[DSA].symptom.startswith("A sentence more. ")
    assert results.seen(tables) == was_seen
    assert results.gone(tables) == []
    assert pages.evidence(tables) == page
    assert patched_wheel(tables, wheels["0.5.12"], tmp_path / "after") == wheel
    # The tool itself finds nothing that has to follow.
    listed = from_copy(seen, "list")
    assert (listed.code, listed.err) == (0, "")
    assert "0.5.99" in listed.out


@pytest.mark.parametrize(
    ("release", "fix", "path"),
    [
        ("0.5.11", BUFFER, "sglang/srt/layers/moe/routed_experts_capturer.py"),
        ("0.5.12", HASH, "sglang/srt/layers/moe/hash_topk.py"),
        ("0.5.12", DSV4, "sglang/srt/layers/moe/hash_topk.py"),
        ("0.5.12", DSA, "sglang/srt/models/deepseek_v2.py"),
        ("0.5.12.post1", REUSE, "sglang/srt/models/deepseek_nextn.py"),
    ],
)
def test_a_changed_hunk_takes_exactly_its_rows(
    release: str, fix: str, path: str, seen: Path, every: set[Row]
) -> None:
    """Those that have the file, with what they need, and those whose red is behind such a patch."""
    tables = load(seen)
    series = patches.load(tables, tables.release(release))
    jobs = [job for job in cuda.jobs(tables) if str(job.release.version) == release]
    changed = change_hunk(seen, release, fix, path)
    expected = {
        (job.fix.name, release)
        for job in jobs
        if not changed.isdisjoint(job.suite.base_has)
        or any(
            path in each.files
            for each in series.patches
            if each.fix in {job.fix.name, *tables.needed(job.fix.name, job.release.version)}
        )
    }
    assert (fix, release) in expected
    found = Rows.of(seen)
    assert found.gone.keys() == expected
    assert found.seen == every - expected
    assert found.gone[fix, release] == [path]
    for (other, _), why in found.gone.items():
        assert why
        assert set(why) <= {path, *changed}, other


def test_a_fix_alone_in_its_files_goes_alone(seen: Path, every: set[Row]) -> None:
    files = patches.load(load(seen), load(seen).release("0.5.11")).files
    path = next(path for path, those in files.items() if [each.fix for each in those] == [SWA])
    assert change_hunk(seen, "0.5.11", SWA, path) == {SWA}
    row = (SWA, "0.5.11")
    assert Rows.of(seen) == Rows(every - {row}, {row: [path]})


def test_others_in_other_files_take_nothing(seen: Path, every: set[Row]) -> None:
    """Another fix's patch changes, comes later in the series, or is dropped; a patch set is another one."""
    path = "sglang/srt/state_capturer/routed_experts.py"
    change_hunk(seen, "0.5.12", BUFFER, path)
    series = patches.load(load(seen), load(seen).release("0.5.12"))
    theirs = {(fix, "0.5.12") for fix in (BUFFER, "routed-experts-capacity")}
    assert {(each.fix, "0.5.12") for each in series.files[path]} & every == theirs
    changed = Rows.of(seen)
    assert changed.seen == every - theirs
    assert changed.gone == {row: [path] for row in theirs}

    release = seen / "patches" / "0.5.12"
    change(release / "release.toml", "patchset = 1\n", "patchset = 2\n")
    # It is alone in its files, and has no test on GPUs there.
    assert all(len(those) == 1 for those in series.files.values() if SWA in {each.fix for each in those})
    change(release / "series", f"{SWA}.patch\n", "")
    (release / f"{SWA}.patch").unlink()
    assert Rows.of(seen) == changed
    change(release / "series", f"{BUFFER}.patch\n", "")
    (release / "series").write_text(f"{BUFFER}.patch\n{(release / 'series').read_text()}")
    assert Rows.of(seen) == changed


def test_a_changed_test_takes_exactly_its_rows(seen: Path, every: set[Row]) -> None:
    test = f"tests/regression/{DSA}/test_dsa_index_sharing_cuda.py"
    edit(seen / test, "# another word")
    # The test that takes no GPU is none of theirs.
    edit(seen / "tests" / "regression" / HASH / "test_hash_topk_dummy_weights.py", "# another word")
    expected = {(fix, release) for fix, release in every if fix == DSA}
    assert len(expected) > 1
    assert Rows.of(seen) == Rows(every - expected, {row: [test] for row in expected})


def test_a_model_for_another_test_takes_nothing(seen: Path) -> None:
    before = results.seen(load(seen))
    models = seen / "tests" / "regression" / "tiny_models.py"
    edit(models, "\n\n# Another.\ndef another_model(path: Path) -> str:\n    return _write_model(path, {})")
    assert results.seen(load(seen)) == before
    assert results.gone(load(seen)) == []


@pytest.mark.parametrize("name", ["deepseek_v4_weights", "glm_moe_dsa", "gpt_oss", "_write_model"])
def test_a_changed_model_takes_the_rows_of_the_tests_that_have_it(
    name: str, seen: Path, every: set[Row]
) -> None:
    tables = load(seen)
    path = "tests/regression/tiny_models.py"
    change(seen / path, f"def {name}(", f"def {name}(  # changed\n    ")
    # All of them are written by this one.
    users = {
        job.fix.name
        for job in cuda.jobs(tables)
        if (names := imported(seen / job.suite.test)) and (name in names or name == "_write_model")
    }
    expected = {(fix, release) for fix, release in every if fix in users}
    assert expected
    assert Rows.of(seen) == Rows(every - expected, {row: [path] for row in expected})


def imported(test: Path) -> set[str]:
    """The models that a test names."""
    return {
        alias.name
        for node in ast.walk(ast.parse(test.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "tiny_models"
        for alias in node.names
    }


MODELS = """
import json
from typing import Any

WORDS = 10
SIZES: dict[str, int] = {"words": WORDS}
FIRST, SECOND = 1, 2

def register(thing):
    return thing

def helper():
    # How it helps.
    return WORDS

def unused():
    return "unused"

@register
class Model:
    size = SIZES["words"]

    def make(self):
        return helper()

async def later():
    return "later"

class Other:
    pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The root of a clone with a test and two modules of its suite."""
    tests = tmp_path / "tests" / "regression"
    (tests / "bug").mkdir(parents=True)
    (tests / "models.py").write_text(MODELS)
    (tests / "servers.py").write_text("def launch():\n    return 1\n")
    write_test(tmp_path, "from models import Model")
    return tmp_path


TEST = "tests/regression/bug/test_bug.py"


def write_test(suite: Path, imports: str) -> None:
    (suite / TEST).write_text(f"import json\nimport unittest\n{imports}\n")


def counts(suite: Path, old: str, new: str, module: str = "models") -> bool:
    """Whether what the test rests on is another after that change of a module, which is taken back."""
    file = suite / "tests" / "regression" / f"{module}.py"
    text, before = file.read_text(), evidence.tests(suite, TEST)
    change(file, old, new)
    after = evidence.tests(suite, TEST)
    file.write_text(text)
    assert evidence.tests(suite, TEST) == before
    assert after.keys() == before.keys()
    return after != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def make(self)", "def make(self, _=0)"),
        ("return helper()", "return helper() + 1"),
        # What these consist of.
        ("# How it helps.", "# How it helped."),
        ("    return WORDS", "    return 2 * WORDS"),
        ("WORDS = 10", "WORDS = 11"),
        ('SIZES: dict[str, int] = {"words"', 'SIZES: dict[str, int] = {"letters": 1, "words"'),
        ("@register\n", "@register\n@register\n"),
        ("@register\n", ""),
        ("    return thing", "    return None"),
        # What runs at import, whoever asks.
        ("FIRST, SECOND = 1, 2", "FIRST, SECOND = 1, 3"),
        ("WORDS = 10\n", "WORDS = 10\nprint(WORDS)\n"),
        ("class Other:", "Model.size = 5\n\nclass Other:"),
    ],
)
def test_what_a_name_consists_of_counts(old: str, new: str, suite: Path) -> None:
    assert counts(suite, old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('return "unused"', "return 1"),
        ("class Other:\n    pass", "class Other:\n    value = 1"),
        ("class Other:\n    pass", ""),
        ("class Other:", "class Another:\n    pass\n\nclass Other:"),
        ("def unused():", "\n# A comment between.\n\n@register\ndef unused():"),
    ],
)
def test_what_others_consist_of_does_not(old: str, new: str, suite: Path) -> None:
    assert not counts(suite, old, new)


@pytest.mark.parametrize(
    "loop",
    [
        "for each in (Model,):\n    register(each)\n",
        "WORDS += helper()\n",
        "with open(__file__) as file:\n    register(file)\n",
        "if WORDS:\n    helper = register(helper)\n",
        "try:\n    import fast\nexcept ImportError:\n    fast = None\n",
    ],
)
def test_statements_that_run_at_import_count(loop: str, suite: Path) -> None:
    assert counts(suite, "class Other:", f"{loop}\n\nclass Other:")


def test_a_name_that_is_assigned_twice(suite: Path) -> None:
    """What its first value consists of counts too."""
    models = suite / "tests" / "regression" / "models.py"
    change(models, "class Other:", "TOTAL = unused()\nTOTAL += 1\n\nclass Other:")
    write_test(suite, "from models import TOTAL")
    assert counts(suite, 'return "unused"', "return 1")
    assert counts(suite, "TOTAL += 1", "TOTAL += 2")


@pytest.mark.parametrize("imports", ["import models", "import models as ours", "from models import *"])
def test_of_a_module_that_is_taken_whole_everything_counts(imports: str, suite: Path) -> None:
    write_test(suite, imports)
    assert counts(suite, 'return "unused"', "return 1")
    assert counts(suite, "# How it helps.", "")


def test_names_inside_of_functions_are_imported_too(suite: Path) -> None:
    write_test(suite, "def test():\n    from models import Other, helper\n    import servers")
    assert counts(suite, "WORDS = 10", "WORDS = 11")
    assert counts(suite, "class Other:\n    pass", "class Other:\n    value = 1")
    assert counts(suite, "return 1", "return 2", module="servers")
    assert not counts(suite, "def make(self)", "def make(self, _=0)")


def test_what_a_module_of_the_suite_imports_counts(suite: Path) -> None:
    assert set(evidence.tests(suite, TEST)) == {TEST, "tests/regression/models.py"}
    servers = suite / "tests" / "regression" / "servers.py"
    servers.write_text("from models import Other\n\n" + servers.read_text())
    write_test(suite, "from servers import launch")
    found = evidence.tests(suite, TEST)
    assert set(found) == {TEST, *(f"tests/regression/{name}.py" for name in ("models", "servers"))}
    assert counts(suite, "class Other:\n    pass", "class Other:\n    value = 1")
    assert not counts(suite, "def make(self)", "def make(self, _=0)")
    # Two that import one another have an end.
    models = suite / "tests" / "regression" / "models.py"
    models.write_text("import servers\n" + models.read_text())
    assert set(evidence.tests(suite, TEST)) == set(found)


def test_differences_are_named() -> None:
    then = {"files": {"a": "1", "b": "2"}, "base": {"fix": "3"}, "tests": {"test": "4"}}
    assert evidence.differences(then, then) == []
    now = {"files": {"a": "9", "c": "2"}, "base": {}, "tests": {"test": "4"}}
    assert evidence.differences(then, now) == ["a", "b", "c", "fix"]
    assert evidence.differences({}, then) == ["a", "b", "fix", "test"]


def test_each_tree_rests_on_its_own(tables: Catalog) -> None:
    """A published tree on the published files and the patches that it has all the same."""
    jobs = jobs_of(tables, DSV4, "0.5.12")
    published, patched = (evidence.grounds(tables, job.release, job.fix, job.suite, job.tree) for job in jobs)
    series = patches.load(tables, jobs[0].release)
    own, needed, base = (series.patch(fix) for fix in (DSV4, EPLB, HASH))
    assert own
    assert needed
    assert base
    paths = {*own.files, *needed.files}
    assert published["files"] == {path: series.published_id(path) for path in paths}
    assert patched["files"] == {path: series.patched_id(path) for path in paths}
    assert published["tests"] == patched["tests"]
    assert (published["base"], patched["base"]) == ({HASH: base.digest}, {})


def jobs_of(tables: Catalog, fix: str, release: str) -> tuple[Job, Job]:
    published, patched = (
        job for job in cuda.jobs(tables) if (job.fix.name, str(job.release.version)) == (fix, release)
    )
    suite = dataclasses.replace(published.suite, reds={f"=={release}": {"Test::test": "the w.rds"}})
    return dataclasses.replace(published, suite=suite), dataclasses.replace(patched, suite=suite)


def start(project: Path, **header: object) -> Run:
    return Run.start(load(project), project / "results", "gpu-Made-Up", {**HEADER, **header})


def cut(project: Path) -> tuple[Path, Job, Job]:
    """A run that found one of two jobs and was cut; a file of some other day."""
    published, patched = jobs_of(load(project), HASH, "0.5.12")
    run = start(project)
    assert run.found(published) is None
    assert not run.path.exists()
    run.add([(published, verdict(published))])
    path = run.path.rename(run.path.with_name("gpu-Made-Up-2026-01-02T030405Z.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"date": DATE}))
    return path, published, patched


def test_a_cut_run_is_gone_on_with(project: Path) -> None:
    path, published, patched = cut(project)
    # Its kernels are compiled by now.
    run = start(project, cold=False)
    assert run.path == path
    assert run.found(published) == verdict(published)
    assert run.found(patched) is None
    run.add([(patched, verdict(patched))])
    assert run.found(patched) == verdict(patched)
    assert results.runs(load(project)) == [json.loads(path.read_text())]
    run.finish()
    contents = json.loads(path.read_text())
    assert {key: contents[key] for key in contents if key not in ("cells", "date")} == {
        **HEADER,
        "seconds": 0,
    }
    assert contents["date"] == DATE
    assert [cell["tree"] for cell in contents["cells"]] == ["published", "patched"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    # A whole one is not.
    again = start(project)
    assert again.path != path
    assert again.found(published) is None


@pytest.mark.parametrize(
    "header", [{"driver": "590.1"}, {"gpus": 2}, {"gpu": "Other"}, {"versions": {"torch": "2.12.0"}}]
)
def test_another_machine_s_run_is_not(header: Mapping[str, object], project: Path) -> None:
    path, published, _ = cut(project)
    before = path.read_bytes()
    run = start(project, **header)
    assert run.path != path
    assert run.found(published) is None
    run.add([(published, verdict(published))])
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2


def test_a_run_of_another_name_is_not(project: Path) -> None:
    path, published, _ = cut(project)
    run = Run.start(load(project), project / "results", "cpu", HEADER)
    assert run.path != path
    assert run.found(published) is None


def test_what_was_wrong_is_run_again(project: Path) -> None:
    _, published, patched = cut(project)
    run = start(project)
    for job, values in (
        (patched, {"outcome": Outcome.ERROR, "detail": "it fails"}),
        (patched, {"outcome": Outcome.NOT_RUN}),
        # What has to come is another by now, the red's words among it.
        (published, {"signatures": {"Test::test": "other words"}}),
        (published, {"signatures": {}}),
    ):
        run.add([(job, verdict(job, **values))])
        assert run.found(job) is None
        assert start(project).found(job) is None
        run.add([(job, verdict(job))])
        assert run.found(job) == verdict(job)
    assert len(json.loads(run.path.read_text())["cells"]) == 2


def test_what_is_another_by_now_is_run_again(project: Path) -> None:
    _, published, _ = cut(project)
    assert start(project).found(published)
    edit(project / published.suite.test, "# another word")
    assert start(project).found(published) is None


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"cells": [{}], "date": ""}', '{"cells": []}'])
def test_a_damaged_file(contents: str, project: Path) -> None:
    path, _, _ = cut(project)
    path.write_text(contents)
    words = f"{path}: not what a run writes: remove it and run again"
    with pytest.raises(PatchsetError) as refusal:
        start(project)
    assert str(refusal.value) == words
    with pytest.raises(PatchsetError) as refusal:
        results.seen(load(project))
    assert str(refusal.value) == words
