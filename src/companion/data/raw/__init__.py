"""Raw MRI of every common format as one record: k-space, mask, voxel size, noise, calibration, and what was found."""
