"""Tasks: texts with their answers, a frozen read-out that makes a model a classifier, a file.

A skill is sought, and measured, by how a model answers texts. `Split` holds texts and answers,
`Prototypes` and `Head` turn what a model makes of a text into logits and train nothing of their
own, and a task file (TOML) names a model, data and a read-out, for `hotgraft localize`.
"""

from hotgraft.tasks.opening import Task, open_task, write_weights
from hotgraft.tasks.readout import Head, Prototypes, Readout, accuracy, embed, predict
from hotgraft.tasks.taskfile import TaskFile, read_task
from hotgraft.tasks.texts import Batch, Split, Tokens

__all__ = [
    "Batch",
    "Head",
    "Prototypes",
    "Readout",
    "Split",
    "Task",
    "TaskFile",
    "Tokens",
    "accuracy",
    "embed",
    "open_task",
    "predict",
    "read_task",
    "write_weights",
]
