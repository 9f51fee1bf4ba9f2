"""Classical reconstructions: what a posterior has to beat."""
