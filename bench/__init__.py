"""What hotgraft costs, beside what one would do instead and beside the floor, measured in one run.

`python -m bench run` measures and appends rows to `bench/results/`, `table` renders the README's
tables from them, `plot` the pictures. Every row keeps every sample, says what ran, whether its bits
were right, and which targets it met; rows that lose stay. `bench/gpu.sh` does all that on a machine
with a GPU; without one, those cases leave rows that say "not measured".
"""
