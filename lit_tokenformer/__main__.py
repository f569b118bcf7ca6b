"""Entry point of ``python -m lit_tokenformer``."""

import sys

from lit_tokenformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
