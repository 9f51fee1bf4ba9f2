"""Translation between contrasts guided by local mutual information (LMI)."""
