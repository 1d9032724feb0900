"""Adaptive studies: the next runs follow from the records so far. No torch.

settings (what the study file says), scans (what may run, and what has run), belief (a model of the loss over rate,
batch and tokens), estimates (what follows from it), policy (records -> a round of runs, with reasons), rounds (carries
the rounds out and keeps their journal).
"""
