"""Run records: what a run writes, and how it is read back. No torch."""
