"""What the host environment's Python answers about its build: names of extensions, headers, options of the compiler.

The build machine's Python reads it in place of its own answers (``_PYTHON_SYSCONFIGDATA_NAME``), in a build for another
platform.
"""

import os
import sys
from pathlib import Path

_HOST = Path(os.environ["PREFIX"])
(_FILE,) = _HOST.glob("lib/python3.*/_sysconfigdata__linux_*.py")

# Its paths follow the prefix of the Python that reads it.
_OWN, sys.base_prefix = sys.base_prefix, str(_HOST)
exec(compile(_FILE.read_text(encoding="utf-8"), _FILE, "exec"))
sys.base_prefix = _OWN
