"""What the processes of zoo.py share: the libraries, imported once."""

from __future__ import annotations

from importlib.util import find_spec

import torch  # noqa: F401
import torchvision  # noqa: F401

import pruningawaretraining.export  # noqa: F401

if find_spec("timm"):
    import timm  # noqa: F401
if find_spec("transformers"):
    import transformers  # noqa: F401
