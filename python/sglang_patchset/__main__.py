import sys

from sglang_patchset.cli import main

sys.exit(main())
