"""`python -m gemma_serve` is `gemma-server`."""

import sys

from gemma_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
