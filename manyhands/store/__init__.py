"""Experts on disk, under one byte budget: `policies.py` decides which records stay in memory."""
