"""Reads recipes from YAML and checks their settings."""
