"""The conformance suite: what `rock.runtime.base` promises, tried on every runtime that can be had here.

A runtime is brought by a `Subject` (subject.py), in a module of this folder that has a list SUBJECTS. A test is skipped
only where its runtime does not declare what the test is about: `@needs(Trait.LIMITS, Files)`. See
docs/adding-a-runtime.md.
"""
