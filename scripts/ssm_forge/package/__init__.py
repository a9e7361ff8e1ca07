"""One package file: written, read, compared with another, and what is in its libraries.

In: a ``.conda`` file, a wheel or a shared library. Out: what it says, rewritten bytes that are the same each time, or
how two of them differ. Nothing here knows which channel a package is in, or why it was built.
"""
