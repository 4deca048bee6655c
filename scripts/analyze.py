"""The same as ``pat analyze``: norms of groups through training, from runs or from any folder of checkpoints.

python scripts/analyze.py RUN_OR_CHECKPOINTS... [--model NAME] [--out analysis.html]
"""

from __future__ import annotations

import sys

from pruningawaretraining.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "analyze")
    main()
