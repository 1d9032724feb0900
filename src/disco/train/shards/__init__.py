"""Tokens that are too many for one file: made by ``prepare``, in folders described by ``index``, read by ``tokens``."""
