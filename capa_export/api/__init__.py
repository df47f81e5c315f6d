"""The Python interface: what the commands do, as functions and two classes.

Nothing is printed: what is said on the way goes to the logger `capa_export`, and `progress` is called with what is
being done, how much of it is done, and how much there is. A user's mistake is a `CapaError`.
"""
