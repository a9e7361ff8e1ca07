"""A prefix in; a report of checks out, each passed, failed, or not run with the reason.

Nothing here repairs, and nothing here trusts what the installation said of itself.
"""
