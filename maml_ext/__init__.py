"""maml_ext: exact MAML meta-gradients on batches of tasks.

``MAML`` wraps a network; ``inner_loop``, ``network``, ``task_loss``, ``sgd_update``, ``hvp``, ``flatten`` and
``unflatten`` are the pieces; ``data`` has tasks to try them on. The meta-gradient is computed by
the CPU engine in ``csrc/``, or by ``reference.py`` for any module and device.
"""

from . import data
from .functional import flatten, hvp, inner_loop, network, task_loss, unflatten
from .maml import MAML, AdaptedTasks, Explanation
from .ops import sgd_update

__version__ = "0.1.0"
__all__ = [
    "MAML",
    "AdaptedTasks",
    "Explanation",
    "data",
    "flatten",
    "hvp",
    "inner_loop",
    "network",
    "sgd_update",
    "task_loss",
    "unflatten",
]
