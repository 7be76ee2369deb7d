"""What the cases on a GPU (`bench/cases/gpu_*.py`) are made of, and the steps of `bench/gpu.sh`."""
