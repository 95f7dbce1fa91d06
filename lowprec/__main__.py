"""``python -m lowprec``, which is what ``accelerate launch -m lowprec train ...`` runs."""

import sys

from lowprec.cli import main

if __name__ == "__main__":
    sys.exit(main())
