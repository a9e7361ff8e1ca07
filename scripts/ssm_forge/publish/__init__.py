"""Packages in; another channel's copy of them out: a folder, our own server, S3, or a hosted server.

A package that is there with the same bytes is not sent again, and one with other bytes is never replaced. Nothing here
builds, signs or judges.
"""
