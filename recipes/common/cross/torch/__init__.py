"""The host environment's torch, as far as building an extension needs it, in a build for another platform.

Its libraries don't run here. Its ``torch.utils.cpp_extension`` is Python, and asks torch for nothing but its version,
and whether it was built with CUDA; headers and libraries are found from where that file is, in the host environment.
"""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

_HOST = Path(os.environ["SP_DIR"]) / "torch"
__path__ = [str(_HOST)]
__file__ = str(_HOST / "__init__.py")

from torch import version  # noqa: E402
from torch.torch_version import __version__  # noqa: E402, F401

# Importing the real one imports most of torch.
utils = ModuleType("torch.utils")
utils.__path__ = [str(_HOST / "utils")]
sys.modules["torch.utils"] = utils

cuda = SimpleNamespace(_is_compiled=lambda: version.cuda is not None, is_available=lambda: False)
xpu = SimpleNamespace(_is_compiled=lambda: False)
backends = SimpleNamespace(mps=SimpleNamespace(is_built=lambda: False))
_C = SimpleNamespace(_GLIBCXX_USE_CXX11_ABI=True)
