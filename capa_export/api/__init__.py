"""The Python interface: what the commands do, as functions and a bundle that is opened."""
