"""Replay and parameter server behind TF-Agents' interfaces, for a user's own training loop."""
