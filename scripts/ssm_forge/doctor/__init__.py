"""Why an environment is broken, and the one command that mends it.

In: the folder of an environment, or a log. Out: findings, the most probable cause first. Read-only. The standard
library and Python 3.8 suffice, because this package also travels alone as ``ssm-forge-doctor.pyz``. Nothing here may
import another part of ssm-forge.
"""

from __future__ import annotations
