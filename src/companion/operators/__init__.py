"""Physics: linear operators, and the MRI built from them."""
