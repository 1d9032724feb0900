"""Distributed Scion: where a tensor's parts lie, who computes what, and what moves."""
