"""hotgraft: version control for live weights.

A graft is a small, checkable, reversible patch to a model. `diff` finds one, `Graft.save` and
`Graft.load` keep it, `compose` joins several, and `attach` makes a running model a host that takes
them in and gives them back bit for bit, in time proportional to the patch.
"""

from hotgraft import errors, train
from hotgraft.composition import Overlap, compose, overlap
from hotgraft.difference import diff
from hotgraft.evaluation import Estimate, Evaluation, evaluate
from hotgraft.format import Provenance
from hotgraft.graft import Entries, Graft, Mask
from hotgraft.host import Host, Skill, attach
from hotgraft.kernels import available as available_backends
from hotgraft.library import Library
from hotgraft.search import localize
from hotgraft.weights import fingerprint

__all__ = [
    "Entries",
    "Estimate",
    "Evaluation",
    "Graft",
    "Host",
    "Library",
    "Mask",
    "Overlap",
    "Provenance",
    "Skill",
    "attach",
    "available_backends",
    "compose",
    "diff",
    "errors",
    "evaluate",
    "fingerprint",
    "localize",
    "overlap",
    "train",
]
