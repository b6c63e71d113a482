"""Reads samples for calibration and evaluation from texts, images and data sets."""
