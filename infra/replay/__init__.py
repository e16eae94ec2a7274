"""Replay: transitions in from the actors' environments, batches of transitions out to learners."""
