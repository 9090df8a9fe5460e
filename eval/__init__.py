"""Measuring: cells, calibration, judging, statistics, the report."""
