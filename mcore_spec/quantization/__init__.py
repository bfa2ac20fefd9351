"""Recipes put into effect: quantised linear maps, their scales, calibration."""
