"""Fine-tuning that localises, and fine-tuning around what is there already.

A small graft carries a skill only where the fine-tuning moved few weights far: `sgd` does, and
`adamw` with an L1 pull towards the base. `protect` makes the positions of a mask untouchable. All
are hooks on plain torch optimizers, so they serve one's own loop, `finetune` and
`transformers.Trainer` alike.
"""

from hotgraft.train.loop import finetune
from hotgraft.train.optimizers import adamw, sgd
from hotgraft.train.protection import Protection, protect
from hotgraft.train.proximal import pull

__all__ = ["Protection", "adamw", "finetune", "protect", "pull", "sgd"]
