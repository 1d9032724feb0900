"""``python -m disco``: the command line."""

import sys

from disco.cli import main

sys.exit(main())
