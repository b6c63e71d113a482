"""Files: written whole or not at all, and the journal of a run."""
