"""memfit fits the training of large models into the memory you have.

The nouns a job of your own needs are here; they load no torch.
"""

from memfit.types.job import Job, Metric, OptimizerChoice

__all__ = ["Job", "Metric", "OptimizerChoice"]
__version__ = "0.1.0"
