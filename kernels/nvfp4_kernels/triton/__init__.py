"""Triton and Gluon kernels, one file per operation; each function has the name and signature of its torch twin."""
