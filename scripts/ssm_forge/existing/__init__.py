"""Kernels for an environment that somebody has, and the torch that is in it.

:mod:`reader` says what is there, :mod:`torch` what its torch is, :mod:`rows` which toolkit and releases fit it,
:mod:`needs` whether what the kernels import is there, :mod:`plan` puts that together; :mod:`job` carries it out,
:mod:`install` puts wheels in, :mod:`check` verifies. Nothing of the environment but the two packages is changed.
"""
