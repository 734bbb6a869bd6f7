"""``python -m heliostat``: the same command as ``heliostat``; the other processes of a DDP run start this way too."""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main())
