"""Implements the command line: it reads arguments, and prints tables and sets exit codes."""
