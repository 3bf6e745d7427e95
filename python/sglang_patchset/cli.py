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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from packaging.version import Version

from sglang_patchset import __version__, catalog, releases, series, status, targets, wheels
from sglang_patchset.catalog import Catalog, Fix
from sglang_patchset.errors import PatchsetError, fault
from sglang_patchset.status import FixState, Report
from sglang_patchset.targets import Package, Target, Wheel

# What an operator's verbs have no use for is imported by the verb that has: it takes as long as they do.
if TYPE_CHECKING:
    from sglang_patchset.verify import Verdict

_COLOURS = {
    FixState.VULNERABLE: "red",
    FixState.PATCHED: "green",
    FixState.FIXED_UPSTREAM: "green",
    FixState.NOT_AFFECTED: "dim",
    FixState.UNKNOWN: "yellow",
}


_WHEELS = {
    "published": "the published wheel, by its sha256",
    "patched": "the patched wheel that releases.toml lists, by its sha256",
    "unlisted": "its sha256 is none that releases.toml lists: not a pinned release's, or packed again",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PatchsetError(f"{message}: see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0; 1 where `status` finds a vulnerable fix, `verify` a cell that does not hold, or
        none that can be run, `rebase` a conflict, or the output cannot be written; 2 where `status` cannot
        tell, or for a refusal; 130 for Ctrl-C.
    """
    # Written at the end: a failure of the output is none of the verb.
    output = io.StringIO()
    try:
        with _interruptible(), contextlib.redirect_stdout(output):
            tables = catalog.load()
            options = _parser(tables).parse_args(arguments)
            code: int = options.run(tables, options)
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


def _parser(tables: Catalog) -> argparse.ArgumentParser:
    parser = _Parser(prog="sglang-patchset", description="Bug fixes for pinned SGLang releases.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    target = "`installed` (this interpreter's), a directory, or a wheel file (default: installed)"
    source = f"one of {tables.pinned()}, or its wheel file"
    find_links = "take the wheel from this directory, not from pip's index"

    verb = verbs.add_parser("list", help="the matrix of fixes and releases")
    verb.set_defaults(run=_list)

    verb = verbs.add_parser("status", help="what each fix is to a target; exit code 1 where it is vulnerable")
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
    default = str(tables.default.version)
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

    verb = verbs.add_parser("pin", help="add a release to releases.toml, with an empty series")
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
        choices=list(map(str, tables.releases)),
        metavar="RELEASE",
        help=f"one of {tables.pinned()} (default: all)",
    )
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.set_defaults(run=_verify)
    return parser


def _list(tables: Catalog, _: argparse.Namespace) -> int:
    rows = []
    for fix in tables.fixes.values():
        pinned = [cell.state.value if (cell := fix.cell(version)) else "?" for version in tables.releases]
        ranges = [f"{fix.cells[versions].state.value} {versions}" for versions in fix.ranges(tables.releases)]
        rows.append((fix.name, f"#{fix.upstream_pr}", *pinned, ", ".join(ranges)))
    _print_table(("fix", "upstream", *map(str, tables.releases), "ranges"), rows)
    for fix in tables.fixes.values():
        noted: dict[str, list[str]] = {}
        for versions, cell in fix.cells.items():
            if cell.note:
                noted.setdefault(cell.note, []).append(str(versions).removeprefix("=="))
        for note, where in noted.items():
            print(f"{fix.name} {', '.join(where)}: {note}")
        if fix.needs:
            print(f"{fix.name} needs {', '.join(fix.needs)}, where both have a patch")
    _print_gaps(tables.fixes.values(), tables.releases)
    return 0


def _print_gaps(fixes: Iterable[Fix], versions: Iterable[Version]) -> None:
    for fix, version in product(fixes, versions):
        if fix.cell(version) is None:
            print(f"fixes.toml: says nothing of {fix.name} in {version}")


def _status(tables: Catalog, options: argparse.Namespace) -> int:
    if options.target in tables.fixes:
        raise PatchsetError(f"{options.target}: a fix: `status` takes a target alone, and lists every fix")
    report = status.examine(tables, targets.find(options.target))
    if options.json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print_report(report)
    states = {each.state for each in report.fixes.values()}
    if FixState.VULNERABLE in states:
        return 1
    return 2 if FixState.UNKNOWN in states else 0


def _apply(tables: Catalog, options: argparse.Namespace) -> int:
    target, names = _target_and_fixes(tables, options.names)
    if isinstance(target, Wheel):
        return _print_wheel(tables, wheels.patch(tables, target, target.file.parent))
    return _print_change(tables, target, "applied", series.apply(tables, target, names))


def _revert(tables: Catalog, options: argparse.Namespace) -> int:
    target, names = _target_and_fixes(tables, options.names)
    if isinstance(target, Wheel):
        return _print_wheel(tables, wheels.unpatch(tables, target))
    return _print_change(tables, target, "took out", series.revert(tables, target, names))


def _wheel(tables: Catalog, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        published = releases.obtain(tables, options.source, Path(scratch), options.find_links)
        target = targets.find(str(published))
        assert isinstance(target, Wheel)
        return _print_wheel(tables, wheels.patch(tables, target, options.out))


def _checkout(tables: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset import upstream

    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        published = releases.obtain(tables, options.source, Path(scratch), options.find_links)
        upstream.checkout(tables, published, options.directory)
    print(f"{options.directory}: on its branch patchset; `git log -p` there shows the fixes")
    return 0


def _rebase(tables: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset import rebase

    done = rebase.rebase(tables, options.directory, options.source, options.find_links)
    rows = [(fix, outcome.value) for fix, outcome, _ in done.fixes]
    _print_table(("fix", f"on {done.release.version}"), rows)
    for fix, _, detail in done.fixes:
        if detail:
            print(f"{fix}: {detail}")
    # What upstream did in other words, git does not see.
    carried = [tables.fix(fix) for fix, outcome, _ in done.fixes if outcome is not rebase.Outcome.DROPPED]
    _print_gaps(carried, [done.release.version])
    if done.done:
        print(f"`sglang-patchset refresh {options.directory}` writes patches/{done.release.version}")
        return 0
    git = f"git -C {options.directory}"
    print(f"solve it there, `{git} add` it, and `{git} am --continue` (or --skip)")
    branch = f"patchset-{done.release.version}"
    print(f"to give up: `{git} am --abort && {git} checkout patchset && {git} branch -D {branch}`")
    return 1


def _export(tables: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset import proposal

    text = options.text or Path(f"{options.fix}.md")
    made = proposal.export(tables, options.fix, options.directory, text)
    print(f"{made.branch}: one commit, the patch of {made.release.version} and {made.test}")
    print(f"{text}: the pull request's text")
    print(f"`git -C {options.directory} format-patch -1 {made.branch}` makes the mail; sign off as you do")
    return 0


def _pin(tables: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset import pins

    release = pins.pin(tables, options.release, options.find_links)
    done = "already pinned" if release.version in tables.releases else "pinned"
    print(f"{release.version}: {done}, {len(release.wheels)} wheels for Python {', '.join(release.python)}")
    _print_gaps(tables.fixes.values(), [release.version])
    return 0


def _refresh(tables: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset import stack

    done = stack.refresh(tables, options.directory)
    rows = [(fix, name, change.value) for fix, name, change in done.changes]
    _print_table(("fix", f"patches/{done.release.version}", ""), rows)
    for reminder in done.reminders:
        print(reminder)
    return 0


def _report(tables: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset import report

    report.write(tables, options.out)
    print(options.out)
    return 0


def _verify(tables: Catalog, options: argparse.Namespace) -> int:
    from sglang_patchset import verify
    from sglang_patchset.verify import Outcome

    colours = {Outcome.RED: "red", Outcome.GREEN: "green", Outcome.NOT_RUN: "yellow"}
    fixes = [tables.fix(name) for name in options.fixes] or list(tables.fixes.values())
    chosen = [
        release for version, release in tables.releases.items() if options.release in (None, str(version))
    ]
    verdicts = verify.run(tables, fixes, chosen, tables.root.parent / ".cache" / "trees")
    ran = [verdict for verdict in verdicts if verdict.outcome is not Outcome.NOT_RUN]
    if options.json:
        values = [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts]
        print(json.dumps(values, indent=2, default=lambda value: value.value))
    else:
        _print_table(
            ("release", "tree", "fix", "outcome", "passed", "skipped", "seconds", ""),
            [
                (
                    each.release,
                    each.tree.value,
                    each.fix,
                    (each.outcome.value, colours.get(each.outcome, "") if each.holds else "bold red"),
                    str(each.passed),
                    str(each.skipped),
                    str(each.seconds),
                    each.detail or _red_signatures(each),
                )
                for each in verdicts
            ],
        )
        print(f"{len(ran)} of {len(verdicts)} run, {sum(verdict.holds for verdict in ran)} as they should be")
        _print_gaps(fixes, [release.version for release in chosen])
    return 0 if ran and all(verdict.holds for verdict in verdicts) else 1


def _red_signatures(verdict: Verdict) -> str:
    """How many tests are red, and the first one's words."""
    if not verdict.signatures:
        return ""
    return f"{len(verdict.signatures)} red, as they should be: {next(iter(verdict.signatures.values()))}"


def _target_and_fixes(tables: Catalog, names: list[str]) -> tuple[Target, list[str]]:
    """A first argument that is no fix names the target."""
    if names and names[0] not in tables.fixes:
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
                "name": each.fix.name,
                "upstream_pr": each.fix.upstream_pr,
                "state": each.state.value,
                "detail": each.detail,
            }
            for each in report.fixes.values()
        ],
    }


def _print_change(tables: Catalog, package: Package, done: str, fixes: list[str]) -> int:
    _print_report(status.examine(tables, package))
    if fixes:
        print(f"{done} {', '.join(fixes)}: restart the servers that run from {package}")
    else:
        print("nothing to do")
    return 0


def _print_wheel(tables: Catalog, wheel: Path) -> int:
    _print_report(status.examine(tables, targets.find(str(wheel))))
    print(wheel)
    return 0


def _print_report(report: Report) -> None:
    print(f"SGLang {report.target.version or '(no version)'} in {report.target}")
    if report.wheel:
        print(_WHEELS[report.wheel])
    _print_table(
        ("fix", "upstream", "state", ""),
        [
            (each.fix.name, f"#{each.fix.upstream_pr}", (each.state.value, _COLOURS[each.state]), each.detail)
            for each in report.fixes.values()
        ],
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> None:
    # Not at the top: --json has no use for it, and it takes a while to import.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    # A name has to be typed: on a narrow terminal the rest is folded, never that.
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text.assemble(cell) for cell in row))
    terminal = sys.__stdout__ is not None and sys.__stdout__.isatty()
    # What is read by another program is not folded to the width of a terminal.
    Console(force_terminal=terminal or None, width=None if terminal else 240).print(table)
