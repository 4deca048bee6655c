"""Second-order pruning: OBS (oBERT), CAP, FastCAP and SparseGPT, with compensation of the weights that stay.

Weights are laid out in blocks (``layout``), gradients gathered without a trace (``gradients``) into Fisher blocks
(``fisher``, ``bank``), tiles ranked (``greedy``, ``methods``) and the weights updated (``solve``). FastCAP and
SparseGPT sweep columns instead (``sweep``, ``layerwise``); ``channels`` and ``reconstruction`` do whole channels.
``criteria`` has the names for configs.
"""

from pruningawaretraining.criteria.second_order.criteria import Cap, FastCap, Obs, Sampling, SparseGpt
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.reconstruction import Reconstruction

__all__ = ["Calibration", "Cap", "FastCap", "Obs", "Reconstruction", "Sampling", "SparseGpt"]
