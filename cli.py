"""`python cli.py ...` from a checkout is `capa-export ...`."""

import sys

from capa_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
