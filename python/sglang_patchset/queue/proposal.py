"""A fix as upstream takes it: one commit with its regression test, and a pull request's text."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sglang_patchset import git, patches
from sglang_patchset.catalog import Catalog, Fix, Release, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.patches import Patch, Series
from sglang_patchset.proof import expected, figures, results
from sglang_patchset.proof.expected import Suite
from sglang_patchset.proof.results import Seen
from sglang_patchset.queue.repository import TAG

# Upstream's unit tests lie as the package does: srt/observability has test/registered/unit/observability.
_TESTS = PurePosixPath("test/registered/unit")
_REGISTRY = "python/sglang/test/ci/ci_register.py"
# The name of the suite of CPU unit tests: stage-a-test-cpu up to 0.5.12.post1, base-a-test-cpu since.
_SUITE = re.compile(r"[a-z]+-a-test-cpu")
_GUIDE = "https://docs.sglang.io/developer_guide/contribution_guide.html"


@dataclass(frozen=True)
class Proposal:
    """A branch with one commit, the path of the test in it, and the release whose patch it is."""

    branch: str
    commit: str
    test: str
    release: Release


def export(catalog: Catalog, name: str, directory: Path, text: Path) -> Proposal:
    """Make a branch `fix/<fix>` with one commit on HEAD, and write the pull request's text.

    Neither the working tree nor the index is touched.

    Args:
        directory: a checkout of SGLang, upstream's or one of `checkout`.
        text: the file to write the text to; a new one.

    Raises:
        PatchsetError: nothing was made, the message says why.
    """
    clone, fix, branch = catalog.clone(), catalog.fix(name), f"fix/{name}"
    suite = expected.load(catalog, fix).suite
    if not (directory / ".git").exists():
        raise PatchsetError(f"{directory}: not the top of a git repository: name a checkout of SGLang")
    if not git.succeeds("cat-file", "-e", "HEAD:python/sglang", cwd=directory):
        raise PatchsetError(f"{directory}: no python/sglang in its HEAD: name a checkout of SGLang")
    if git.run("branch", "--list", branch, cwd=directory):
        raise PatchsetError(f"{directory}: has a branch {branch}: delete or rename it")
    if text.exists():
        raise PatchsetError(f"{text}: is there already: name another file")
    if not text.parent.is_dir():
        raise PatchsetError(f"{text}: no directory {text.parent}: make it, or name another file")
    who = git.identity(directory)
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        release, patch = _apply(catalog, fix, directory, index)
        test = _test_path(fix, suite, directory)
        if git.succeeds("cat-file", "-e", f"HEAD:{test}", cwd=directory):
            raise PatchsetError(f"{directory}: has {test} already: see what it tests")
        file, message = Path(scratch, "test.py"), Path(scratch, "message")
        file.write_text(
            _registered((clone / suite.test).read_text(encoding="utf-8"), directory), encoding="utf-8"
        )
        blob = git.run("hash-object", "-w", "--no-filters", str(file), cwd=directory).strip()
        git.run("update-index", "--add", "--cacheinfo", f"100644,{blob},{test}", cwd=directory, env=index)
        subject, body = _message(patch, Path(scratch))
        message.write_text(f"{subject}\n\n{body}\n", encoding="utf-8")
        tree = git.run("write-tree", cwd=directory, env=index).strip()
        head = git.run("rev-parse", "HEAD", cwd=directory).strip()
        commit = git.run("commit-tree", "-p", head, "-F", str(message), tree, cwd=directory, env=who).strip()
        stat = git.run("diff", "--no-color", "--no-ext-diff", "--stat", head, commit, cwd=directory)
    seen = [each for each in results.seen(catalog) if each.fix == name]
    patched = {str(each) for each in fix.patched}
    page = _page(suite, release, subject, body, stat, test, seen, figures.speed(clone, name, patched))
    text.write_text(page, encoding="utf-8")
    git.run("update-ref", f"refs/heads/{branch}", commit, "", cwd=directory)
    return Proposal(branch, commit, test, release)


def _apply(catalog: Catalog, fix: Fix, directory: Path, index: Mapping[str, str]) -> tuple[Release, Patch]:
    """Put the fix into an index of HEAD: the patch of the release that fits, the newest first."""
    listed = git.run("ls-tree", "-r", "HEAD", "python/sglang", cwd=directory)
    all_series = [patches.load(catalog, release) for release in catalog.releases.values()]
    candidates = [
        (series, patch)
        for series in sorted(all_series, key=lambda each: each.release.version, reverse=True)
        if (patch := series.patch(fix.name))
    ]
    # The patch of the very release comes first, where HEAD is one, with other fixes or without: by its files,
    # then by its tag.
    tags = git.run("tag", "--merged", "HEAD", cwd=directory).split()
    tagged = [each for each in catalog.releases if not {f"v{each}", f"{TAG}{each}"}.isdisjoint(tags)]
    candidates.sort(
        key=lambda each: (_files_of(each[0], each[1], listed), each[0].release.version in tagged),
        reverse=True,
    )
    if not candidates:
        raise PatchsetError(f"{fix.name}: no release has a patch for it: see `sglang-patchset list`")
    cell = fix.cell(max(tagged)) if tagged else None
    if cell and cell.state in (State.UPSTREAM, State.NOT_AFFECTED):
        raise PatchsetError(
            f"{directory}: SGLang {max(tagged)}, by its tag, does not need {fix.name}: "
            "see `sglang-patchset list`"
        )
    git.run("read-tree", "HEAD", cwd=directory, env=index)

    def has(patch: Patch) -> bool:
        file = str(patch.path)
        return git.succeeds("apply", "--cached", "--check", "-R", file, cwd=directory, env=index)

    if any(has(patch) for _, patch in candidates):
        raise PatchsetError(f"{directory}: its HEAD has {fix.name} already: check out one without it")
    lacking = [
        [each.fix for each in series.patches if each.fix in patch.needs and not has(each)]
        for series, patch in candidates
    ]
    # Three-way wherever git has the release's blobs: where no patch fits as it is.
    for options in ([], ["--3way"]):
        for (series, patch), lacks in zip(candidates, lacking, strict=True):
            git.run("read-tree", "HEAD", cwd=directory, env=index)
            if lacks:
                continue
            if git.succeeds("apply", "--cached", *options, str(patch.path), cwd=directory, env=index):
                return series.release, patch
    git.run("read-tree", "HEAD", cwd=directory, env=index)
    series, patch = candidates[0]
    if lacking[0]:
        raise PatchsetError(
            f"{directory}: its HEAD lacks {', '.join(lacking[0])}, which {fix.name} needs: "
            "export that first, and check out its branch"
        )
    try:
        git.run("apply", "--cached", "--check", str(patch.path), cwd=directory, env=index)
    except PatchsetError as error:
        raise PatchsetError(
            f"{patch.path}: does not fit HEAD, three-way neither ({error}): check out SGLang "
            f"{series.release.version}, or carry the series on by `sglang-patchset rebase`"
        ) from None
    raise AssertionError("it applied neither with nor without --check")


def _files_of(series: Series, patch: Patch, listed: str) -> int:
    """How many of a patch's files are that release's own in a listing, with some fixes in them or none."""
    ids = ({blob for each in series.files[path] for blob in each.files[path]} for path in patch.files)
    return sum(any(blob in listed for blob in each) for each in ids)


def _test_path(fix: Fix, suite: Suite, directory: Path) -> str:
    """Where upstream keeps such a test: beside those of the code that the fix is in."""
    code = next(
        (path for path in fix.code if git.succeeds("cat-file", "-e", f"HEAD:python/{path}", cwd=directory)),
        fix.code[0],
    )
    return str(_TESTS / PurePosixPath(code).relative_to("sglang/srt").parent / Path(suite.test).name)


def _registered(test: str, directory: Path) -> str:
    """The test, registered in the suite that its neighbours are in."""
    pattern = ["-h", "-o", "-E", f'"{_SUITE.pattern}"', "HEAD"]
    plain = ["--no-line-number", "--no-column", "--no-color"]
    places = ["--", str(_TESTS), _REGISTRY]
    if git.succeeds("grep", "-q", *pattern[2:], *places, cwd=directory):
        found = git.run("grep", *plain, *pattern, *places, cwd=directory).split()
        test = _SUITE.sub(Counter(found).most_common(1)[0][0].strip('"'), test)
    return test


def _message(patch: Patch, scratch: Path) -> tuple[str, str]:
    """The subject and the body of a patch's message, without our trailers."""
    header = git.run("mailinfo", str(scratch / "body"), str(scratch / "diff"), cwd=scratch, stdin=patch.path)
    subject = re.search(r"^Subject: (.*)$", header, re.MULTILINE)
    assert subject, "every mail of git's has one"
    body, _, trailers = (scratch / "body").read_text(encoding="utf-8").strip().rpartition("\n\n")
    assert "Patchset-Fix: " in trailers, "every patch has its trailers"
    return subject[1], body


def _page(
    suite: Suite,
    release: Release,
    subject: str,
    body: str,
    stat: str,
    test: str,
    seen: Sequence[Seen],
    speed: Sequence[str],
) -> str:
    """The pull request's text, in the form of upstream's template."""
    why: list[str] = []
    how: list[str] = []
    for paragraph in body.split("\n\n"):
        (how if how or paragraph.startswith("Fix: ") else why).append(paragraph)
    reds = "\n".join(
        f"- `{name}`: `{signature}`" for name, signature in suite.reds_of(release.version).items()
    )
    gpu = "\n".join(
        f"- {each.on}, {each.date[:10]}, {each.release}: without the change {each.published}, "
        f"«{each.words}»; with it {each.patched}"
        for each in seen
    )
    return f"""{subject}

## Motivation

{_joined(why)}

## Modifications

{_joined(how)}

```
{stat.rstrip()}
```

## Accuracy Tests

`{test}` runs on the CPU. Without the change, on {release.version}, these of its tests fail, each with the words that match:

{reds}

{f"On GPUs, with real models and servers:{chr(10) * 2}{gpu}" if gpu else "On a GPU: not run."}

## Speed Tests and Profiling

{chr(10).join(f"- {sentence}" for sentence in speed) or "Not run."}

## Checklist

- [ ] Format your code according to the [Format code with pre-commit]({_GUIDE}#format-code-with-pre-commit).
- [x] Add unit tests according to the [Run and add unit tests]({_GUIDE}#run-and-add-unit-tests).
- [ ] Update documentation according to [Write documentations]({_GUIDE}#write-documentations).
- [ ] Provide accuracy and speed benchmark results according to [Test the accuracy]({_GUIDE}#test-the-accuracy) and [Benchmark the speed]({_GUIDE}#benchmark-the-speed).
- [ ] Follow the SGLang code style [guidance]({_GUIDE}#code-style-guidance).
"""  # noqa: E501


def _joined(paragraphs: Sequence[str]) -> str:
    """Paragraphs without the line ends of a commit message."""
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
