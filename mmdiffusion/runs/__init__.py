# SPDX-License-Identifier: MIT
"""What the subcommands do: `jobs` has the options of all of them, and each other module a job, or what jobs share."""
