"""A channel folder over HTTP, with tokens for reading and for writing, for a lab.

In: requests. Out: files of the channel; an upload becomes a package only when it is whole and checked.
"""
