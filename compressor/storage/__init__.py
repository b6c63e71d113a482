"""Writes files completely or not at all, and keeps the journal of a run."""
