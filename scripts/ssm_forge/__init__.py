"""ssm-forge: causal-conv1d and mamba-ssm as conda packages with real CUDA kernels.

Data flows one way: manifest -> solve -> build -> channel -> install -> verify.
"""

from __future__ import annotations

__version__ = "0.1.0"
