"""`python -m sidfast`: the commands of `sidfast`."""

import sys

from sidfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
