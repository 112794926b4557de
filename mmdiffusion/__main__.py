# SPDX-License-Identifier: MIT
"""`python -m mmdiffusion`, the same as the command `mmdiffusion`."""

from mmdiffusion.cli import main

if __name__ == "__main__":
    main()
