"""Sweep files: what they may hold, how they are read and checked."""
