"""Shared vocabulary: devices, links, clusters, time, errors. No I/O, no torch."""
