"""Records or a lock in; a prefix or a pack out, whole or not at all.

Nothing here decides which packages are wanted, or asks whether they work.
"""
