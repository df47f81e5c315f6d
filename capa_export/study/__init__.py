"""Studies of methods and bundles: evaluate, tune, explain and compare."""
