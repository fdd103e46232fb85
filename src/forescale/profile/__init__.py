"""Measure: devices and links, operators on a device, upcoming batches."""
