"""TorchTitan 0.3.0 with Token-Superposition Training, out of tree: nothing of TorchTitan is forked or patched.

    torchrun --nproc_per_node 8 -m torchtitan.train --module superpose.engines.torchtitan --config llama3_270m_tst

`with_superposition` puts a schedule on any configuration of TorchTitan's own llama3, qwen3, qwen3-MoE and deepseek-v3. The bag
axis is the switch here too: ids ``[batch, positions, bag]`` are superposed, and no model, loss or validator knows the step.

    section.py          the ``tst`` section of a configuration, as a `superpose.schedule.Schedule`
    batch.py            plain batches to a superposed one; what happens at the end of a document
    embedding.py        override of the embedding: the mean of a bag, also over a vocabulary sharded by tensor parallelism
    loss.py             override of the cross-entropy: one log-sum-exp for the bag, also over a sharded vocabulary
    store.py            dataloader over a store of `superpose prepare`: the batch is a function of the step
    metrics.py          positions and data tokens apart, stage and bag size, the switch
    trainer.py          the trainer that puts these together, and `with_superposition`
    export.py           Hugging Face layout with its config.json, for plain transformers
    config_registry.py  the paper's models and their baselines

docs/torchtitan.md has the commands, and what each parallelism was tested with.
"""

from superpose.engines.torchtitan.section import Superposition
from superpose.engines.torchtitan.store import TokenStoreLoader
from superpose.engines.torchtitan.trainer import Trainer, with_superposition

__all__ = ["Superposition", "TokenStoreLoader", "Trainer", "with_superposition"]
