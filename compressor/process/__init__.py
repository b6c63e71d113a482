"""Starts fresh processes, and repairs the streams and search path of this one."""
