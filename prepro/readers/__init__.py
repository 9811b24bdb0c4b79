"""One reader per data set: published layout in, cases and voxels out."""
