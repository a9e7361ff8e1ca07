"""One file a command: options in, one call into the folders below, output.

No command decides anything: what is wrong with a request is said where the request is understood. The list of commands
is in :mod:`ssm_forge.cli`.
"""
