"""In a build for another platform: this machine's Python answers as the host's, and finds the host's torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CROSS = Path(__file__).parents[3] / "recipes/common/cross"

_DATA = """\
build_time_vars = {'EXT_SUFFIX': '.cpython-311-aarch64-linux-gnu.so', 'INCLUDEPY': '@PREFIX@/include/python3.11'}

import sys as _sys
build_time_vars = {
    key: value.replace('@PREFIX@', _sys.base_prefix) if isinstance(value, str) else value
    for key, value in build_time_vars.items()
}
"""

_ASK = """\
import json, sys, sysconfig
import torch
from torch.utils.cpp_extension import include
print(json.dumps({
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"), "headers": sysconfig.get_config_var("INCLUDEPY"),
    "platform": sysconfig.get_platform(), "torch": [torch.__version__, torch.version.cuda, torch.__file__],
    "include": include(), "own": sys.base_prefix,
    "cuda": [torch.cuda._is_compiled(), torch.cuda.is_available(), torch.xpu._is_compiled()],
}))
"""


def test_extensions_and_headers_are_the_hosts_and_no_library_of_its_torch_is_loaded(tmp_path: Path) -> None:
    site = tmp_path / "lib/python3.11/site-packages"
    (site / "torch/utils").mkdir(parents=True)
    (tmp_path / "lib/python3.11/_sysconfigdata__linux_aarch64-linux-gnu.py").write_text(_DATA)
    (site / "torch/__init__.py").write_text("raise ImportError('its libraries are for another machine')\n")
    (site / "torch/utils/__init__.py").write_text("raise ImportError('it imports most of torch')\n")
    (site / "torch/version.py").write_text("__version__ = '2.11.0+cu130'\ncuda = '13.0'\nhip = None\n")
    (site / "torch/torch_version.py").write_text("from torch.version import __version__\n")
    (site / "torch/utils/cpp_extension.py").write_text(
        "import os\nimport torch\ndef include():\n    return os.path.dirname(os.path.dirname(__file__)) + '/include'\n"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
        "PREFIX": str(tmp_path),
        "SP_DIR": str(site),
        "PYTHONPATH": str(CROSS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "_PYTHON_SYSCONFIGDATA_NAME": "_sysconfigdata_of_host",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }
    done = subprocess.run([sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {
        "suffix": ".cpython-311-aarch64-linux-gnu.so",
        "headers": f"{tmp_path}/include/python3.11",
        "platform": "linux-aarch64",
        "torch": ["2.11.0+cu130", "13.0", f"{site}/torch/__init__.py"],
        "include": f"{site}/torch/include",
        "own": sys.base_prefix,
        "cuda": [True, False, False],
    }
