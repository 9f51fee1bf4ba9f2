"""Estimators of mutual information: no weights, not networks."""
