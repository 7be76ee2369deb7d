"""A library: thousands of skills by name, of which as many are loaded as a budget allows.

`Library` is what its users see. `shelf` keeps the budgets, and `folder` keeps a library like a
folder of files.
"""

from hotgraft.library.folder import Changes
from hotgraft.library.library import Entry, Library, Stats

__all__ = ["Changes", "Entry", "Library", "Stats"]
