"""Processes: started fresh, with sound streams and search paths."""
