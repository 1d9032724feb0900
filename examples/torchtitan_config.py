"""torchtitan's debug model with Disco, as a configuration of torchtitan:

torchrun --nproc-per-node 8 -m torchtitan.train --module examples.torchtitan_config --config debugmodel
"""

from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from disco.integrations import TorchtitanMetrics, TorchtitanOptimizer


def debugmodel() -> Trainer.Config:
    """The optimizer, and norms in the metrics; all else is torchtitan's."""
    config = llama3_debugmodel()
    config.optimizer = TorchtitanOptimizer.Config(lr=2**-5, ratios={"hidden": 1 / 8}, momentum=0.9)
    config.metrics = TorchtitanMetrics.Config(log_freq=1, record="runs/torchtitan/debugmodel")
    config.training.max_norm = float("inf")  # the steepest step does not depend on the size of the gradient
    return config
