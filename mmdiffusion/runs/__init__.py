# SPDX-License-Identifier: MIT
"""The jobs behind the command line: processes, the folder a job writes to, sampling."""
