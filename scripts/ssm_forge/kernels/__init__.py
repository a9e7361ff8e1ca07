"""Numerical checks and measurements of the CUDA kernels, run where the kernels are installed.

This subpackage imports nothing but the standard library, torch, and (when asked to test them) the two
packages under test. It runs inside the target prefix's own Python, and on a bare machine that has only
Python, torch and a GPU: ``python -m ssm_forge.kernels --help``.
"""

from __future__ import annotations
