"""`python -m dpt_search`."""

import sys

from dpt_search.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
