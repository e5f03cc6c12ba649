"""Texts: tokens, and the tasks of GLUE."""
