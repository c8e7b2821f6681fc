"""Where Triton kernels run in tests: on the GPU if there is one, else in Triton's interpreter, on the CPU.

The variable is Triton's own; it counts when a kernel is imported, so it is set before any test module is.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
