"""Token-Superposition Training: pre-train on bags of tokens first, then on tokens, and keep a stock model.

The method is in five short files that need only torch: `superpose.bags`, `superpose.embedding`, `superpose.loss`,
`superpose.schedule` and, as their oracle, `superpose.reference`.
"""

from superpose.bags import fold, next_position_targets, position_weights
from superpose.data.batches import ScheduledTokens
from superpose.data.store import TokenStore
from superpose.embedding import bag_mean
from superpose.errors import InputError
from superpose.loss import linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from superpose.models import attach, detach
from superpose.schedule import Schedule, Stage

__all__ = [
    "InputError",
    "Schedule",
    "ScheduledTokens",
    "Stage",
    "TokenStore",
    "attach",
    "bag_mean",
    "detach",
    "fold",
    "linear_multi_hot_cross_entropy",
    "multi_hot_cross_entropy",
    "next_position_targets",
    "position_weights",
]
__version__ = "0.1.0"
