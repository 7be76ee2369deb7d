"""What can go wrong, one class a kind.

Every message names the thing, says what was found and what was wanted, and what to do. All derive
from `HotgraftError`; where Python has a fitting built-in (`ValueError`, `KeyError`, ...) a class
derives from that too, so callers can catch either.
"""


class HotgraftError(Exception):
    """Base of every error hotgraft raises on purpose."""


class FormatError(HotgraftError, ValueError):
    """A file is not a valid graft or checkpoint: truncated, hostile, or of another version."""


class GraftError(HotgraftError, ValueError):
    """Entries do not make a valid graft or mask: unsorted, out of range, empty, unequal."""


class BaseMismatchError(HotgraftError, ValueError):
    """A graft does not fit this base: other shapes, dtypes, or other bits where it writes."""


class CoverageError(HotgraftError, ValueError):
    """Some tensors of a graft have no counterpart, or more than one, in the host or checkpoint."""


class LayoutError(HotgraftError, ValueError):
    """A module stores its weights in another layout than its checkpoint (fused experts)."""


class ParameterError(HotgraftError, ValueError):
    """A parameter cannot be written in place: meta, quantised, read-only, overlapping, ..."""


class NonFiniteError(HotgraftError, ValueError):
    """A NaN or infinity where none is allowed, or an overflow to infinity while composing."""


class DataError(HotgraftError, ValueError):
    """What a run was given cannot be used: no batches, too few, a loss that is no scalar, ..."""


class OverlapError(HotgraftError, ValueError):
    """Grafts disagree on shared positions under the policy `refuse`."""


class UnknownSkillError(HotgraftError, KeyError):
    """No skill of that name is loaded."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class SkillInUseError(HotgraftError, RuntimeError):
    """The skill is live, or the name is taken."""


class LibraryFullError(HotgraftError, RuntimeError):
    """What a library holds and may not let go leaves no room for another skill."""


class HostChangedError(HotgraftError, RuntimeError):
    """Somebody else moved or wrote the host's weights since hotgraft last looked."""


class GateError(HotgraftError, RuntimeError):
    """A commit was asked for inside a forward pass or a hold of the same thread."""


class BackendError(HotgraftError, RuntimeError):
    """The backend asked for cannot run here."""


class DeviceMemoryError(BackendError):
    """A device has no room for what should be loaded or composed; nothing was changed."""


class ModelNotFoundError(HotgraftError, FileNotFoundError):
    """The pretrained model that was asked for is not at hand."""


class EvaluationError(HotgraftError, ValueError):
    """Logits and labels cannot be scored: shapes, types, labels out of range, bad options."""


class CastWarning(UserWarning):
    """Entries of a graft became equal to the base when rounded to the host's precision."""


class PartialWarning(UserWarning):
    """Part of a graft was left out on request."""


class UnreachedWarning(UserWarning):
    """A search got no gradient for some of the tensors that it could choose from."""


class AdoptWarning(UserWarning):
    """Skills were unloaded because they no longer fit the adopted base."""
