"""Torch twins of every kernel: the definition of right, and the path that serves CPU tensors."""
