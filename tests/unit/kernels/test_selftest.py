"""The references and the checks, tested on the CPU with injected faults.

The tools environment has no torch: there these skip. `./run test` runs them inside an installed environment.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed here; ./run test runs this in an installed env")

from ssm_forge.kernels import selftest

TESTS = selftest.tests()


@pytest.mark.parametrize("name", TESTS)
def test_checks_are_sound(name: str) -> None:
    TESTS[name]()
