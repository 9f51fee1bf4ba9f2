"""Files of weights: checkpoints, the registry, the hub, published formats."""
