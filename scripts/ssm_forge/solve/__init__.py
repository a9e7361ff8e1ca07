"""Requirements in, exact packages out; the lock that keeps them, and what other tools read of it.

In: specs, channels and a machine's virtual packages. Out: records with hashes, ``pixi.lock``, exports. Nothing here
downloads a package, builds one, or touches a prefix.
"""
