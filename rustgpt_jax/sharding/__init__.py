"""Device meshes, partition rules, and what the hardware offers."""
