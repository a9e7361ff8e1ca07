"""A target in; what its build costs out: seconds, CPU, memory, and where they went.

Nothing that is measured here changes how anything is built; ``bench build --record`` writes the costs that a build then
orders its compilers by.
"""
