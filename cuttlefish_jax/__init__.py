"""Automatic low-rank training for JAX and Flax."""
