"""Other forms of config, one module each; importing them here is what makes them known."""

from pruningawaretraining.config.dialects import flat, intel, sirc, sparseml
from pruningawaretraining.config.dialects.base import TAG, Dialect, native

__all__ = ["TAG", "Dialect", "flat", "intel", "native", "sirc", "sparseml"]
