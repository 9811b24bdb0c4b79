"""Networks, losses and objectives of MG-3D."""
