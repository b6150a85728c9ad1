"""Device meshes, partition rules, and hardware specifications."""
