"""The budget of what is loaded: what counts, and who goes first."""

from hotgraft.library.budget import Budget


def anything(_: str) -> bool:
    return True


def test_the_least_recently_used_come_first() -> None:
    budget = Budget[str](10)
    for name in "abc":
        budget.put(name, 3)
    budget.touch("a")
    assert budget.all() == ["b", "c", "a"]
    assert budget.candidates(4, anything) == ["b", "c", "a"]
    assert budget.candidates(4, lambda name: name != "c") == ["b", "a"]


def test_nobody_goes_where_that_is_of_no_use() -> None:
    budget = Budget[str](10)
    budget.put("a", 3)
    budget.put("b", 6)
    assert budget.candidates(5, lambda name: name == "a") == []
    assert budget.candidates(4, lambda name: name == "a") == ["a"]
    assert budget.candidates(11, anything) == []


def test_what_counts() -> None:
    budget = Budget[str](10)
    budget.put("a", 3)
    budget.nbytes += 6  # reserved
    assert (len(budget), "a" in budget, budget.nbytes) == (1, True, 9)
    assert budget.fits(1)
    assert not budget.fits(2)
    assert budget.excess(3) == 2
    budget.remove("a")
    assert (len(budget), "a" in budget, budget.nbytes) == (0, False, 6)
