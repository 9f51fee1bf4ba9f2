"""Scanners: how a measurement comes about."""
