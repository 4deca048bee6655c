"""Getting back what pruning has taken, in a loop of one's own: rates, averages of weights, more epochs.

``pat run`` does the same where a config has ``recovery``; see docs/recovery.md.
"""

from pruningawaretraining.recovery.average import averaged, measure_norms, take_average
from pruningawaretraining.recovery.budget import epochs_for_time, step_seconds
from pruningawaretraining.recovery.rates import RewoundRates, course_of, rewound, warm_up

__all__ = [
    "RewoundRates",
    "averaged",
    "course_of",
    "epochs_for_time",
    "measure_norms",
    "rewound",
    "step_seconds",
    "take_average",
    "warm_up",
]
