"""The command's entry: what is said when it is stopped, or fails, before `cli` can say it.

Nothing is imported up here, and nothing from the working directory at all: `python -m` puts that first.
"""

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]


def main() -> int:
    """Run the command; the exit code is that of `cli.main`."""
    try:
        import os
        import signal

        def stop(*_: object) -> None:
            # An exception would be lost, or told at length, where an import or the end of Python catches it.
            os.write(2, b"sglang-patchset: interrupted: run it again\n")
            os._exit(130)

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, stop)
        from sglang_patchset import cli

        return cli.main()
    except KeyboardInterrupt:
        print("sglang-patchset: interrupted: run it again", file=sys.stderr)
        return 130
    except Exception as error:
        # Not 1, which says of a target that it is vulnerable.
        print(f"sglang-patchset: cannot start ({error}): install sglang-patchset again", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
