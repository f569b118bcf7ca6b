"""``python -m benchmarks.gpu``."""

import sys

from benchmarks.gpu.check import main

sys.exit(main())
