"""Replay: agent steps of the actors in, batches of transitions for the learners out."""
