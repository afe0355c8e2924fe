"""Structured output: from what a request asks for to the tokens that may come next, over llguidance.

`constraint` reads a request's fields, `source` writes them as one grammar, `compiler` makes matchers of it
once a limited process found that it can be done, `matcher` says which tokens may follow.
"""
