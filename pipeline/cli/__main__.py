"""Entry point of ``python -m edgepress.pipeline.cli``."""

import sys

from edgepress.pipeline.cli.commands import main

sys.exit(main())
