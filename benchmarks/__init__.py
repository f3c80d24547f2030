"""Programs that measure. A package, so that another one of this name is not found in its place."""
