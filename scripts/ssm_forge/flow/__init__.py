"""Options in; a plan; then the steps, one after the other: solve, build, channel, install, verify.

The plan is worked out before anything is done, and a dry run shows exactly it. What a step does is known to its own
folder alone.
"""
