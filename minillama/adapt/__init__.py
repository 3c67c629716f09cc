"""Finished models, changed from outside: tensor_parallel shares every matrix among processes."""
