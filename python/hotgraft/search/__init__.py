"""Searching for the entries of a fine-tuned model that carry its skill."""

from hotgraft.search.learned import Learned
from hotgraft.search.localization import METHODS, localize
from hotgraft.search.method import Method, Search, Step
from hotgraft.search.panigrahi import Panigrahi
from hotgraft.search.scores import FirstOrder, Fisher, Movement, Snip

__all__ = [
    "METHODS",
    "FirstOrder",
    "Fisher",
    "Learned",
    "Method",
    "Movement",
    "Panigrahi",
    "Search",
    "Snip",
    "Step",
    "localize",
]
