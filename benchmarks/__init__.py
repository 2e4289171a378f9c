"""Time, memory and error of the kernels and of a whole training step, against eager PyTorch. See README.md."""
