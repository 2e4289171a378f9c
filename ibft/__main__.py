"""`python -m ibft`: the command line."""

import sys

from ibft.cli import main

sys.exit(main())
