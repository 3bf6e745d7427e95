"""The command `sglang-patchset`: arguments in, tables out."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from packaging.version import Version

from sglang_patchset import __version__, matrix, releases, repair, status, tables, targets, wheels
from sglang_patchset import catalog as catalogue
from sglang_patchset.catalog import Catalog, Fix
from sglang_patchset.errors import PatchsetError, fault, tell
from sglang_patchset.status import OPEN, FixState, Report
from sglang_patchset.targets import Package, Target, Wheel

# What an operator's verbs have no use for is imported by the verb that has: it takes as long as they do.
if TYPE_CHECKING:
    from sglang_patchset.proof.judge import Verdict

_COLOURS = {
    FixState.VULNERABLE: "red",
    FixState.FIXED_IN_PART: "yellow",
    FixState.PATCHED: "green",
    FixState.FIXED_UPSTREAM: "green",
    FixState.NOT_AFFECTED: "dim",
    FixState.UNKNOWN: "yellow",
}


_WHEELS = {
    "published": "the published wheel, by its sha256",
    "patched": "the patched wheel that patched.sha256 lists, by its sha256",
    "unlisted": "its sha256 is none that is listed: not a pinned release's, or packed again",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PatchsetError(f"{message}: see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0; 1 where `status` finds a bug that is open, `verify` a cell that does not hold, or
        none that can be run, `rebase` a conflict, or the output cannot be written; 2 where `status` cannot
        tell, or finds a rest that no patch repairs, or for a refusal; 130 for Ctrl-C.
    """
    # Written at the end: a failure of the output is none of the verb.
    output = io.StringIO()
    try:
        with _interruptible(), contextlib.redirect_stdout(output):
            found = catalogue.load()
            options = _parser(found).parse_args(arguments)
            code: int = options.run(found, options)
    except (PatchsetError, OSError) as error:
        print(f"sglang-patchset: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sglang-patchset: interrupted: run it again", file=sys.stderr)
        return 130
    except SystemExit:  # --help and --version
        code = 0
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        print(f"sglang-patchset: {fault(error)}", file=sys.stderr)
        return 2
    return code if _write(output.getvalue()) else code or 1


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is an exception here, so that what is under way is put in order; outside, it may end at once."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> bool:
    """Write to stdout; False where that fails. A reader that has enough, as `head` does, is no failure."""
    if sys.stdout is None:
        return True
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return True
        print(f"sglang-patchset: done, but stdout cannot be written to: {error}", file=sys.stderr)
        return False
    return True


def _parser(catalog: Catalog) -> argparse.ArgumentParser:
    parser = _Parser(prog="sglang-patchset", description="Bug fixes for pinned SGLang releases.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    target = "`installed` (this interpreter's), a directory, or a wheel file (default: installed)"
    source = f"one of {catalog.pinned()}, or its wheel file"
    find_links = "take the wheel from this directory, not from pip's index"

    verb = verbs.add_parser("list", help="the matrix of fixes and releases")
    verb.set_defaults(run=_list)

    verb = verbs.add_parser("status", help="what each fix is to a target; exit code 1 where one is not fixed")
    verb.add_argument("target", nargs="?", default=targets.INSTALLED, metavar="TARGET", help=target)
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.set_defaults(run=_status)

    for name, run, text in (
        ("apply", _apply, "put fixes into a target; of a wheel, write the patched one beside it"),
        ("revert", _revert, "take fixes out of a target; of a patched wheel, write the plain one beside it"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument(
            "names", nargs="*", metavar="[TARGET] [FIX ...]", help=f"{target}, then fixes (default: all)"
        )
        verb.set_defaults(run=run)

    verb = verbs.add_parser("wheel", help="the patched wheel of a release")
    default = str(catalog.default_version)
    verb.add_argument(
        "source", nargs="?", default=default, metavar="RELEASE", help=f"{source} (default: {default})"
    )
    verb.add_argument("out", nargs="?", type=Path, default=Path("dist"), metavar="OUT", help="default: dist")
    verb.add_argument("--find-links", type=Path, metavar="DIR", help=find_links)
    verb.set_defaults(run=_wheel)

    verb = verbs.add_parser("checkout", help="a git repository: a release, and one commit for each fix")
    verb.add_argument("source", metavar="RELEASE", help=source)
    verb.add_argument("directory", type=Path, metavar="DIR", help="what becomes the repository; new or empty")
    verb.add_argument("--find-links", type=Path, metavar="DIR", help=find_links)
    verb.set_defaults(run=_checkout)

    verb = verbs.add_parser("refresh", help="write patches/ again from the commits of such a repository")
    verb.add_argument("directory", type=Path, metavar="DIR", help="what `checkout` made")
    verb.set_defaults(run=_refresh)

    verb = verbs.add_parser("rebase", help="carry a series to another release, in such a repository")
    verb.add_argument("directory", type=Path, metavar="DIR", help="what `checkout` made")
    verb.add_argument("source", metavar="NEW_RELEASE", help=source)
    verb.add_argument("--find-links", type=Path, metavar="DIR", help=find_links)
    verb.set_defaults(run=_rebase)

    verb = verbs.add_parser("export", help="a branch with one commit for upstream, and a pull request's text")
    verb.add_argument("fix", metavar="FIX")
    verb.add_argument("directory", type=Path, metavar="CHECKOUT", help="a git checkout of SGLang")
    verb.add_argument(
        "text", nargs="?", type=Path, metavar="TEXT", help="the text's file (default: FIX.md, here)"
    )
    verb.set_defaults(run=_export)

    verb = verbs.add_parser("pin", help="add a release to patches/, with an empty series")
    verb.add_argument("release", metavar="RELEASE", help="its version")
    verb.add_argument("--find-links", type=Path, metavar="DIR", help=find_links)
    verb.set_defaults(run=_pin)

    verb = verbs.add_parser("report", help="results/ as one HTML page")
    verb.add_argument(
        "out", nargs="?", type=Path, default=Path("report.html"), metavar="OUT", help="default: report.html"
    )
    verb.set_defaults(run=_report)

    verb = verbs.add_parser("verify", help="red on the published release, green on the patched one")
    verb.add_argument("fixes", nargs="*", metavar="FIX", help="default: all")
    verb.add_argument(
        "--release",
        choices=list(map(str, catalog.releases)),
        metavar="RELEASE",
        help=f"one of {catalog.pinned()} (default: all)",
    )
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.set_defaults(run=_verify)
    return parser


def _list(catalog: Catalog, _: argparse.Namespace) -> int:
    for fix in catalog.fixes.values():
        print(f"{fix.name}  #{fix.upstream_pr}")
        _print_paragraphs([fix.title], 2)
        rows = [[f"    {state}", places] for state, places in matrix.states(catalog, fix)]
        for line in tables.table(("", ""), rows)[1:]:
            print(line)
        _print_paragraphs(matrix.remarks(catalog, fix))
    _print_gaps(catalog, catalog.releases)
    for why in catalog.damaged.values():
        print(why)
    return 0


def _print_paragraphs(texts: Iterable[str], indent: int = 4) -> None:
    for line in tables.paragraphs(texts, indent):
        print(line)


def _print_gaps(catalog: Catalog, versions: Iterable[Version], names: Collection[str] | None = None) -> None:
    for fix, version in product(catalog.fixes.values(), versions):
        if fix.cell(version) is None and (names is None or fix.name in names):
            print(f"patches/fixes/{fix.name}.toml: says nothing of {version}, whose series lacks it")


def _status(catalog: Catalog, options: argparse.Namespace) -> int:
    if options.target in catalog.fixes:
        raise PatchsetError(f"{options.target}: a fix: `status` takes a target alone, and lists every fix")
    report = status.examine(catalog, targets.find(options.target))
    if options.json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print_report(report)
    return _exit_code(report)


def _exit_code(report: Report) -> int:
    """1 where something is vulnerable or can be repaired, 2 where something else is not known to be good."""
    found = report.fixes.values()
    if any(each.state is FixState.VULNERABLE or (each.state in OPEN and each.patch) for each in found):
        return 1
    return 2 if any(each.state in (*OPEN, FixState.UNKNOWN) for each in found) else 0


def _apply(catalog: Catalog, options: argparse.Namespace) -> int:
    target, names = _target_and_fixes(catalog, options.names)
    if isinstance(target, Wheel):
        return _print_wheel(catalog, wheels.patch(catalog, target, target.file.parent))
    return _print_change(catalog, target, "applied", repair.apply(catalog, target, names))


def _revert(catalog: Catalog, options: argparse.Namespace) -> int:
    target, names = _target_and_fixes(catalog, options.names)
    if isinstance(target, Wheel):
        return _print_wheel(catalog, wheels.unpatch(catalog, target))
    return _print_change(catalog, target, "took out", repair.revert(catalog, target, names))


def _wheel(catalog: Catalog, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        published = releases.obtain(catalog, options.source, Path(scratch), options.find_links)
        target = targets.find(str(published))
        assert isinstance(target, Wheel)
        return _print_wheel(catalog, wheels.patch(catalog, target, options.out))


def _checkout(catalog: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset.queue import repository

    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        published = releases.obtain(catalog, options.source, Path(scratch), options.find_links)
        repository.checkout(catalog, published, options.directory)
    print(f"{options.directory}: on its branch patchset; `git log -p` there shows the fixes")
    return 0


def _rebase(catalog: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset.queue import rebase

    done = rebase.rebase(catalog, options.directory, options.source, options.find_links)
    for line in tables.table(
        ("fix", f"on {done.release.version}"), [(fix, fate.value) for fix, fate, _ in done.fixes]
    ):
        print(line)
    for fix, _, detail in done.fixes:
        if detail:
            print(f"{fix}: {detail}")
    # What upstream did in other words, git does not see.
    carried = {fix for fix, fate, _ in done.fixes if fate is not rebase.Fate.DROPPED}
    _print_gaps(catalog, [done.release.version], carried)
    if done.done:
        print(f"`sglang-patchset refresh {options.directory}` writes patches/{done.release.version}")
        return 0
    git = f"git -C {options.directory}"
    print(f"solve it there, `{git} add` it, and `{git} am --continue` (or --skip)")
    branch = f"patchset-{done.release.version}"
    print(f"to give up: `{git} am --abort && {git} checkout patchset && {git} branch -D {branch}`")
    return 1


def _export(catalog: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset.queue import proposal

    text = options.text or Path(f"{options.fix}.md")
    made = proposal.export(catalog, options.fix, options.directory, text)
    print(f"{made.branch}: one commit, the patch of {made.release.version} and {made.test}")
    print(f"{text}: the pull request's text")
    print(f"`git -C {options.directory} format-patch -1 {made.branch}` makes the mail; sign off as you do")
    return 0


def _pin(catalog: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset.queue import pins

    release = pins.pin(catalog, options.release, options.find_links)
    done = "already pinned" if release.version in catalog.releases else "pinned"
    print(f"{release.version}: {done}, {len(release.wheels)} wheels for Python {', '.join(release.python)}")
    _print_gaps(catalog, [release.version])
    return 0


def _refresh(catalog: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset.queue import stack

    done = stack.refresh(catalog, options.directory)
    rows = [(fix, change.value) for fix, change in done.changes]
    for line in tables.table(("fix", f"patches/{done.release.version}"), rows):
        print(line)
    for reminder in done.reminders:
        print(reminder)
    return 0


def _report(catalog: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset.proof import report

    report.write(catalog, options.out)
    print(options.out)
    return 0


def _verify(catalog: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset.proof import expected, verify
    from sglang_patchset.proof.plan import Outcome

    colours = {Outcome.RED: "red", Outcome.GREEN: "green", Outcome.NOT_RUN: "yellow"}
    fixes = [catalog.fix(name) for name in options.fixes] or list(catalog.fixes.values())
    suites = [expected.load(catalog, fix) for fix in fixes]
    chosen = [
        release for version, release in catalog.releases.items() if options.release in (None, str(version))
    ]
    verdicts = verify.run(
        catalog, suites, chosen, catalog.clone() / ".cache", lambda line: print(line, file=sys.stderr)
    )
    ran = [verdict for verdict in verdicts if verdict.outcome is not Outcome.NOT_RUN]
    if options.json:
        values = [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts]
        print(json.dumps(values, indent=2, default=lambda value: value.value))
    else:
        rows: list[list[tables.Cell]] = [
            [
                each.release,
                each.tree.value,
                each.fix,
                (each.outcome.value, colours.get(each.outcome, "") if each.holds else "bold red"),
                str(each.passed),
                str(each.skipped),
                str(each.seconds),
            ]
            for each in verdicts
        ]
        header = ("release", "tree", "fix", "outcome", "passed", "skipped", "seconds")
        first, *lines = tables.table(header, rows)
        print(first)
        for line, each in zip(lines, verdicts, strict=True):
            print(line)
            _print_paragraphs([each.detail or _red_signatures(each)])
        print(f"{len(ran)} of {len(verdicts)} run, {sum(verdict.holds for verdict in ran)} as they should be")
        _print_gaps(catalog, [release.version for release in chosen], {fix.name for fix in fixes})
    return 0 if ran and all(verdict.holds for verdict in verdicts) else 1


def _red_signatures(verdict: Verdict) -> str:
    """How many tests are red, and the first one's words."""
    if not verdict.signatures:
        return ""
    return f"{len(verdict.signatures)} red, as they should be: {next(iter(verdict.signatures.values()))}"


def _target_and_fixes(catalog: Catalog, names: list[str]) -> tuple[Target, list[str]]:
    """A first argument that is no fix names the target."""
    if names and names[0] not in catalog.fixes:
        target, fixes = targets.find(names[0]), names[1:]
    else:
        target, fixes = targets.find(targets.INSTALLED), names
    fixes = list(dict.fromkeys(fixes))
    if isinstance(target, Wheel) and fixes:
        raise PatchsetError(
            f"{target}: a patched wheel has the whole series: install it and revert fixes there"
        )
    return target, fixes


def _as_json(report: Report) -> dict[str, object]:
    return {
        "target": str(report.target),
        "version": str(report.target.version) if report.target.version else None,
        "release": str(report.release.version) if report.release else None,
        "wheel": report.wheel,
        "fixes": [
            {
                "name": each.name,
                "state": each.state.value,
                "detail": each.detail,
                "patch": each.patch,
                **(_fix_as_json(each.fix) if each.fix else {}),
            }
            for each in report.fixes.values()
        ],
    }


def _fix_as_json(fix: Fix) -> dict[str, object]:
    return {
        "title": fix.title,
        "upstream_pr": fix.upstream_pr,
        "symptom": fix.symptom,
        "when": [asdict(each) for each in fix.when],
        "log": list(fix.log),
        "needs": list(fix.needs),
    }


def _print_change(catalog: Catalog, package: Package, done: str, fixes: list[str]) -> int:
    _print_status(catalog, package, done=bool(fixes))
    if fixes:
        print(f"{done} {', '.join(fixes)}: restart the servers that run from {package}")
    else:
        print("nothing to do")
    return 0


def _print_wheel(catalog: Catalog, wheel: Path) -> int:
    target = targets.find(str(wheel))
    _print_status(catalog, target, done=True)
    print(wheel)
    return 0


def _print_status(tables: Catalog, target: Target, *, done: bool) -> None:
    """What a verb has come to; where something is done, no failure to tell that is a failure of the verb."""
    try:
        report = status.examine(tables, target)
    except (PatchsetError, OSError) as error:
        if not done:
            raise
        tell(f"{target}: done, but its status cannot be told: {error}")
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    print(f"SGLang {report.target.version or '(no version)'} in {report.target}")
    if report.wheel:
        print(_WHEELS[report.wheel])
    rows: list[list[tables.Cell]] = [
        [
            each.name,
            f"#{each.fix.upstream_pr}" if each.fix else "",
            (each.state.value, _COLOURS[each.state]),
        ]
        for each in report.fixes.values()
    ]
    first, *lines = tables.table(("fix", "upstream", "state"), rows)
    print(first)
    for line, each in zip(lines, report.fixes.values(), strict=True):
        print(line)
        symptom = each.fix.symptom if each.fix and each.state in OPEN else ""
        _print_paragraphs([symptom, each.detail])
