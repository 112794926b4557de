# SPDX-License-Identifier: MIT
"""The parts of bench/tune.py: what is tuned and tried, compiling it, the race, the tables."""
