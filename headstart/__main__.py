"""`python -m headstart` is the command `headstart`, for where that isn't on the path."""

import sys

from headstart.cli import main

if __name__ == "__main__":
    sys.argv[0] = "headstart"
    main()
