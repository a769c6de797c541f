"""Pallas kernels for band attention, on GPU and TPU; see `contract`."""
